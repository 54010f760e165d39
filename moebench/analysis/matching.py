"""Are two arms matched? Equal compute per token as executed, equal training tokens, the same data and evaluation.

Compute is what the runs measured, not what was planned: the forward FLOPs per token of the whole model, mean over all
steps of training (each pass counts) and on the test split. Arms whose layout matches total parameters
(layout.match=params) are compared by these instead; a comparison has one quantity, and an arm solved for the other is
not matched. An arm of another cost is marked and gets no verdict; arms trained or evaluated on other data are refused.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from moebench.errors import UsageError
from moebench.training.result import RunResult

TOLERANCE = 0.02  # of the baseline's executed FLOPs per token, router and shared experts counted, or of its parameters
FLOPS = ("train_flops_per_token", "eval_flops_per_token")
PARAMS = ("total_params",)
SOLVED_FOR = {FLOPS: "FLOPs per token", PARAMS: "total parameters"}


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """One way in which an arm is not comparable with the baseline: a mark for tables, a reason for people."""

    mark: str
    reason: str
    is_cost: bool = False
    """The arm can be shown beside the others, since it did the same task on the same data at another cost."""


def mismatches(
    runs: Sequence[RunResult], baseline_runs: Sequence[RunResult], quantities: Sequence[str] = FLOPS
) -> tuple[Mismatch, ...]:
    """Return every way in which the finished runs of an arm differ from those of the baseline.

    `quantities`: of their cost, what all arms of the comparison must have equal: `FLOPS` or `PARAMS`.
    """
    others = sorted(solved_for(runs) - {tuple(quantities)})
    found = [
        _other_match(others[0], tuple(quantities)) if others else _unequal_cost(quantities, runs, baseline_runs),
        _other_tokens(runs, baseline_runs),
        _same("≠data", "data_digest", [r.data_digest for r in runs], [r.data_digest for r in baseline_runs]),
        _same("≠eval", "eval_digest", [r.eval_digest for r in runs], [r.eval_digest for r in baseline_runs]),
    ]
    return tuple(mismatch for mismatch in found if mismatch is not None)


def matched_or_refuse(
    done: Mapping[str, Sequence[RunResult]], baseline: str, *, allow: bool
) -> dict[str, tuple[Mismatch, ...]]:
    """Return the mismatches of each arm that has finished runs, in the order given.

    Raises UsageError when an arm differs in more than its cost and `allow` is not set.
    """
    if not done.get(baseline):
        return {}
    quantities = _quantities([done[baseline], *done.values()])
    found = {arm: mismatches(runs, done[baseline], quantities) for arm, runs in done.items() if runs}
    clauses = [f"arm '{arm}': {m.reason}" for arm, all_of_arm in found.items() for m in all_of_arm if not m.is_cost]
    if clauses and not allow:
        raise UsageError(
            f"{'; '.join(clauses)} (baseline '{baseline}'). Arms not matched cannot say which router "
            "is better: match them, or give --allow-mismatch to see them side by side, marked."
        )
    return found


def arms_without_verdict(found: Mapping[str, Sequence[Mismatch]], *, allow: bool) -> list[str]:
    """Return the arms that get no verdict and are never best; with `allow` those that differ in cost alone get one."""
    return [arm for arm, of_arm in found.items() if any(not (allow and mismatch.is_cost) for mismatch in of_arm)]


def cost_ratio(key: str, runs: Sequence[RunResult], baseline_runs: Sequence[RunResult]) -> float | None:
    """Return an arm's mean of a cost over the baseline's; None where it is not known for every run."""
    ours, theirs = ([run.cost.get(key, 0.0) for run in of_arm] for of_arm in (runs, baseline_runs))
    if not ours or not theirs or not all(value > 0 for value in (*ours, *theirs)):
        return None
    return fmean(ours) / fmean(theirs)


def solved_for(runs: Iterable[RunResult]) -> set[tuple[str, ...]]:
    """Return what the width of the experts was solved for; a dense arm has none and goes with either."""
    found: set[tuple[str, ...]] = set()
    for run in runs:
        layout, router = run.config.get("layout", {}), run.config.get("router", {})
        if router.get("name") != "dense":
            by_params = layout.get("match") == "params" and layout.get("expert_width") is None
            found.add(PARAMS if by_params else FLOPS)
    return found


def _quantities(arms: Iterable[Iterable[RunResult]]) -> tuple[str, ...]:
    """Return what a comparison compares by: what the first arm that has experts was solved for."""
    return next((sorted(found)[0] for runs in arms if (found := solved_for(runs))), FLOPS)


def _other_match(ours: tuple[str, ...], quantities: tuple[str, ...]) -> Mismatch:
    reason = (
        f"its width was solved for {SOLVED_FOR[ours]}, the comparison is by {SOLVED_FOR[quantities]} (layout.match)"
    )
    return Mismatch(mark="≠match", reason=reason)


def _unequal_cost(
    quantities: Sequence[str], runs: Sequence[RunResult], baseline_runs: Sequence[RunResult]
) -> Mismatch | None:
    mark, what = ("≠params", "parameters") if "total_params" in quantities else ("≠FLOPs", "FLOPs")
    ratios = {key: cost_ratio(key, runs, baseline_runs) for key in quantities}
    unknown = [key for key, ratio in ratios.items() if ratio is None]
    if unknown:
        return Mismatch(mark=mark, reason=f"{unknown[0]} is not known for every run", is_cost=True)
    known = {key: ratio for key, ratio in ratios.items() if ratio is not None}
    if all(abs(ratio - 1) <= TOLERANCE + 1e-9 for ratio in known.values()):  # 2 % sharp is allowed, however rounded
        return None
    where = {"train_flops_per_token": " in training", "eval_flops_per_token": " in evaluation"}
    figures = ", ".join(f"{ratio:.3g} times{where.get(key, '')}" for key, ratio in known.items())
    reason = f"not matched: executed {what} over the baseline's are {figures} (allowed ±{100 * TOLERANCE:.0f} %)"
    return Mismatch(mark=mark, reason=reason if what == "FLOPs" else reason.replace("executed ", ""), is_cost=True)


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


def _same(mark: str, key: str, given: Iterable[str], wanted: Iterable[str]) -> Mismatch | None:
    ours, theirs = set(given), set(wanted)
    if len(ours | theirs) == 1:
        return None
    return Mismatch(mark=mark, reason=f"{key} is {_listed(ours)}, the baseline's {_listed(theirs)}")


def _listed(values: set[str]) -> str:
    return " and ".join(sorted(value[:12] for value in values))
