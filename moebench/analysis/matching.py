"""Are two arms matched? Equal compute per token, equal training tokens, the same data and evaluation.

Arms whose layout matches total parameters (layout.match=params) are compared by these instead of by FLOPs; a
comparison has one quantity, and an arm solved for the other is not matched.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from moebench.errors import UsageError
from moebench.training.result import RunResult

TOLERANCE = 0.02  # of the baseline's active FLOPs per token, router and shared experts counted, or of its parameters
MARKS = {"flops_per_token": "≠FLOPs", "total_params": "≠params"}


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """One way in which an arm is not comparable with the baseline: a mark for tables, a reason for people."""

    mark: str
    reason: str


def mismatches(
    runs: Sequence[RunResult], baseline_runs: Sequence[RunResult], quantity: str = "flops_per_token"
) -> tuple[Mismatch, ...]:
    """Return every way in which the finished runs of an arm differ from those of the baseline.

    `quantity`: of their cost, what all arms of the comparison must have equal.
    """
    others = sorted(solved_for(runs) - {quantity})
    found = [
        _other_match(others[0], quantity) if others else _unequal(quantity, runs, baseline_runs),
        _other_tokens(runs, baseline_runs),
        _same("≠passes", "train_passes", map(_passes, runs), map(_passes, baseline_runs)),
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
    quantity = _quantity([done[baseline], *done.values()])
    found = {arm: mismatches(runs, done[baseline], quantity) for arm, runs in done.items() if runs}
    clauses = [f"arm '{arm}': {m.reason}" for arm, all_of_arm in found.items() for m in all_of_arm]
    if clauses and not allow:
        raise UsageError(
            f"{'; '.join(clauses)} (baseline '{baseline}'). Arms not matched cannot say which router "
            "is better: match them, or give --allow-mismatch to see them side by side, marked."
        )
    return found


def solved_for(runs: Iterable[RunResult]) -> set[str]:
    """Return what the width of the experts was solved for; a dense arm has none and goes with either."""
    found = set()
    for run in runs:
        layout, router = run.config.get("layout", {}), run.config.get("router", {})
        if router.get("name") != "dense":
            by_params = layout.get("match") == "params" and layout.get("expert_width") is None
            found.add("total_params" if by_params else "flops_per_token")
    return found


def _quantity(arms: Iterable[Iterable[RunResult]]) -> str:
    """Return what a comparison compares by: what the first arm that has experts was solved for."""
    return next((sorted(found)[0] for runs in arms if (found := solved_for(runs))), "flops_per_token")


def _other_match(ours: str, quantity: str) -> Mismatch:
    words = {"flops_per_token": "FLOPs per token", "total_params": "total parameters"}
    reason = f"its width was solved for {words[ours]}, the comparison is by {words[quantity]} (layout.match)"
    return Mismatch(mark="≠match", reason=reason)


def _unequal(quantity: str, runs: Sequence[RunResult], baseline_runs: Sequence[RunResult]) -> Mismatch | None:
    mark = MARKS[quantity]
    given, wanted = _cost(quantity, runs), _cost(quantity, baseline_runs)
    if not given or not wanted:
        return Mismatch(mark=mark, reason=f"{quantity} is not known for every run")
    ours, theirs = max(product(given, wanted), key=lambda pair: abs(pair[0] / pair[1] - 1))
    excess = ours / theirs - 1
    if abs(excess) <= TOLERANCE + 1e-9:  # 2 % sharp is allowed, however it is rounded
        return None
    figures = f"{quantity} is {ours:,.0f}, the baseline's {theirs:,.0f}"
    return Mismatch(mark=mark, reason=f"{figures} ({100 * excess:+.2f} %, allowed ±{100 * TOLERANCE:.0f} %)")


def _cost(quantity: str, runs: Sequence[RunResult]) -> list[float]:
    found = [run.cost.get(quantity, 0.0) for run in runs]
    return found if all(value > 0 for value in found) else []


def _other_tokens(runs: Sequence[RunResult], baseline_runs: Sequence[RunResult]) -> Mismatch | None:
    """Compare seed by seed: where sequences differ in length, each seed draws another number, the same for all arms."""
    baseline = {run.seed: _tokens(run) for run in baseline_runs}
    pairs = [(_tokens(run), baseline[run.seed]) for run in runs if run.seed in baseline]
    if not pairs:
        return _same("≠tokens", "train_tokens", map(_tokens, runs), baseline.values())
    ours, theirs = next((pair for pair in pairs if pair[0] != pair[1]), pairs[0])
    return _same("≠tokens", "train_tokens", [ours], [theirs])


def _tokens(run: RunResult) -> str:
    tokens = run.cost.get("train_tokens")
    return "unknown" if tokens is None else f"{tokens:,.0f}"


def _passes(run: RunResult) -> str:
    return f"{run.cost.get('train_passes', 1):.0f}"


def _same(mark: str, key: str, given: Iterable[str], wanted: Iterable[str]) -> Mismatch | None:
    ours, theirs = set(given), set(wanted)
    if len(ours | theirs) == 1:
        return None
    return Mismatch(mark=mark, reason=f"{key} is {_listed(ours)}, the baseline's {_listed(theirs)}")


def _listed(values: set[str]) -> str:
    return " and ".join(sorted(value[:12] for value in values))
