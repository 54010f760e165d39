"""Are two arms matched? Equal compute per token, equal training tokens, the same data and evaluation."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from moebench.errors import UsageError
from moebench.training.result import RunResult

FLOPS_TOLERANCE = 0.02  # of the baseline's active FLOPs per token, router and shared experts counted


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """One way in which an arm is not comparable with the baseline: a mark for tables, a reason for people."""

    mark: str
    reason: str


def mismatches(runs: Sequence[RunResult], baseline_runs: Sequence[RunResult]) -> tuple[Mismatch, ...]:
    """Return every way in which the finished runs of an arm differ from those of the baseline."""
    found = [
        _flops(runs, baseline_runs),
        _same("≠tokens", "train_tokens", map(_tokens, runs), map(_tokens, baseline_runs)),
        _same("≠data", "data_digest", [r.data_digest for r in runs], [r.data_digest for r in baseline_runs]),
        _same("≠eval", "eval_digest", [r.eval_digest for r in runs], [r.eval_digest for r in baseline_runs]),
    ]
    return tuple(mismatch for mismatch in found if mismatch is not None)


def matched_or_refuse(
    done: Mapping[str, Sequence[RunResult]], baseline: str, *, allow: bool
) -> dict[str, tuple[Mismatch, ...]]:
    """Return the mismatches of each arm that has finished runs, in the order given.

    Raises UsageError when there are any and `allow` is not set.
    """
    if not done.get(baseline):
        return {}
    found = {arm: mismatches(runs, done[baseline]) for arm, runs in done.items() if runs}
    clauses = [f"arm '{arm}': {m.reason}" for arm, all_of_arm in found.items() for m in all_of_arm]
    if clauses and not allow:
        raise UsageError(
            f"{'; '.join(clauses)} (baseline '{baseline}'). Arms not matched cannot say which router "
            "is better: match them, or give --allow-mismatch to see them side by side, marked."
        )
    return found


def _flops(runs: Sequence[RunResult], baseline_runs: Sequence[RunResult]) -> Mismatch | None:
    given, wanted = _flops_per_token(runs), _flops_per_token(baseline_runs)
    if not given or not wanted:
        return Mismatch(mark="≠FLOPs", reason="flops_per_token is not known for every run")
    ours, theirs = max(product(given, wanted), key=lambda pair: abs(pair[0] / pair[1] - 1))
    excess = ours / theirs - 1
    if abs(excess) <= FLOPS_TOLERANCE + 1e-9:  # 2 % sharp is allowed, however it is rounded
        return None
    figures = f"flops_per_token is {ours:,.0f}, the baseline's {theirs:,.0f}"
    return Mismatch(mark="≠FLOPs", reason=f"{figures} ({100 * excess:+.2f} %, allowed ±{100 * FLOPS_TOLERANCE:.0f} %)")


def _flops_per_token(runs: Sequence[RunResult]) -> list[float]:
    found = [run.cost.get("flops_per_token", 0.0) for run in runs]
    return found if all(flops > 0 for flops in found) else []


def _tokens(run: RunResult) -> str:
    tokens = run.cost.get("train_tokens")
    return "unknown" if tokens is None else f"{tokens:,.0f}"


def _same(mark: str, key: str, given: Iterable[str], wanted: Iterable[str]) -> Mismatch | None:
    ours, theirs = set(given), set(wanted)
    if len(ours | theirs) == 1:
        return None
    return Mismatch(mark=mark, reason=f"{key} is {_listed(ours)}, the baseline's {_listed(theirs)}")


def _listed(values: set[str]) -> str:
    return " and ".join(sorted(value[:12] for value in values))
