"""Are two arms matched? Equal compute per token as executed, equal training tokens, the same data and evaluation.

Compute is what the runs measured, not what was planned: the forward FLOPs per token of the whole model, mean over all
steps of training (each pass counts) and on the test split. Arms whose layout matches total parameters
(layout.match=params) are compared by these instead. All arms of a comparison are matched by the same quantity; an arm
whose width was solved for the other one is refused. An arm of another cost is marked and gets no verdict; arms trained
or evaluated on other data are refused.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from moebench.errors import UsageError
from moebench.runs.result import RunResult

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
        _other_passes(runs, baseline_runs) if tuple(quantities) == PARAMS else None,
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
    """Return the ratio of an arm's mean cost to the baseline's; None if any run lacks this cost.

    Over the seeds that both have, as the difference of their quality; over all where they share none.
    """
    common = {run.seed for run in runs} & {run.seed for run in baseline_runs}
    arms = [[run for run in of_arm if run.seed in common or not common] for of_arm in (runs, baseline_runs)]
    ours, theirs = ([run.cost.get(key, 0.0) for run in of_arm] for of_arm in arms)
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
    figures = ", ".join(f"{ratio:.5g} times the baseline's{where.get(key, '')}" for key, ratio in known.items())
    subject = "parameters are" if what == "parameters" else "executed FLOPs are"
    return Mismatch(mark=mark, reason=f"{subject} {figures} (matched: ±{100 * TOLERANCE:.0f} %)", is_cost=True)


def _other_passes(runs: Sequence[RunResult], baseline_runs: Sequence[RunResult]) -> Mismatch | None:
    """Compare how often training runs each token, where FLOPs are not compared."""
    passes = ([f"{run.cost.get('train_passes', 1):.0f}" for run in of_arm] for of_arm in (runs, baseline_runs))
    found = _same("≠passes", "train_passes", *passes)
    return None if found is None else replace(found, is_cost=True)


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
