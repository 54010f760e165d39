"""Matching of arms: equal compute per token as executed, equal training tokens, the same data and evaluation.

Compute is measured, not planned: the forward FLOPs per token of the whole model, mean over all
steps of training (each pass counts) and on the test split. Arms whose layout matches total parameters
(layout.match=params) are compared by these instead. All arms of a comparison are matched by the same quantity; an arm
whose width was solved for the other quantity is refused. An arm of another cost is marked and gets no verdict; arms
trained or evaluated on other data are refused. An arm that was trained on more or fewer tokens is matched where the
FLOPs of all its training steps are those of the baseline, such as a dense parent that continues for the FLOPs of an
upcycled model; the table says so.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from moebench.analysis.training_flops import compute_training_flops
from moebench.errors import UsageError
from moebench.runs.result import RunResult
from moebench.training.utilization import BACKWARD_FACTOR

TOLERANCE = 0.02
"""Largest difference from the baseline's executed FLOPs per token, with router and shared experts, or parameters."""
FLOPS = ("train_flops_per_token", "eval_flops_per_token")
PARAMS = ("total_params",)
BY_TRAINING_FLOPS = "=training FLOPs"
"""Mark of an arm that was trained on other tokens than the baseline, for equal FLOPs."""
DATA_MARKS = ("≠data", "≠eval")
"""Marks of arms that are trained or evaluated on other data."""
SOLVED_FOR = {FLOPS: "FLOPs per token", PARAMS: "total parameters"}


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """One way in which an arm is not comparable with the baseline: a mark for tables and the reason in full."""

    mark: str
    reason: str
    is_cost: bool = False
    """The arm did the same task on the same data, at another cost."""
    is_matched: bool = False
    """The arm is matched all the same, by its FLOPs of training: verdicts hold, and the mark says by what."""


def find_mismatches(
    runs: Sequence[RunResult], baseline_runs: Sequence[RunResult], quantities: Sequence[str] = FLOPS
) -> tuple[Mismatch, ...]:
    """Return every way in which the finished runs of an arm differ from those of the baseline.

    `quantities`: the costs that all arms of the comparison must have equal: `FLOPS` or `PARAMS`.
    """
    others = sorted(list_matched_quantities(runs) - {tuple(quantities)})
    cost = _width_mismatch(others[0], tuple(quantities)) if others else _check_cost(quantities, runs, baseline_runs)
    tokens = _check_tokens(runs, baseline_runs)
    if tokens is not None and tuple(quantities) == FLOPS and not others:
        by_total = _match_training_flops(runs, baseline_runs, tokens)
        cost, tokens = (by_total, None) if by_total is not None else (cost, tokens)
    candidates = [
        cost,
        _check_passes(runs, baseline_runs) if tuple(quantities) == PARAMS else None,
        tokens,
        _check_equal(
            DATA_MARKS[0], "data_digest", [r.data_digest for r in runs], [r.data_digest for r in baseline_runs]
        ),
        _check_equal(
            DATA_MARKS[1], "eval_digest", [r.eval_digest for r in runs], [r.eval_digest for r in baseline_runs]
        ),
    ]
    return tuple(mismatch for mismatch in candidates if mismatch is not None)


def check_matching(
    done: Mapping[str, Sequence[RunResult]], baseline: str, *, allow: bool
) -> dict[str, tuple[Mismatch, ...]]:
    """Return the mismatches of each arm that has finished runs, in the order given.

    Raises UsageError when an arm differs in more than its cost and `allow` is not set.
    """
    if not done.get(baseline):
        return {}
    quantities = _find_quantities([done[baseline], *done.values()])
    mismatches = {arm: find_mismatches(runs, done[baseline], quantities) for arm, runs in done.items() if runs}
    clauses = [
        f"arm '{arm}': {m.reason}"
        for arm, of_arm in mismatches.items()
        for m in of_arm
        if not (m.is_cost or m.is_matched)
    ]
    if clauses and not allow:
        raise UsageError(
            f"{'; '.join(clauses)} (baseline '{baseline}'). Unmatched arms do not show which router "
            "is better: match them, or give --allow-mismatch to see them side by side, marked."
        )
    return mismatches


def list_unmatched_arms(mismatches: Mapping[str, Sequence[Mismatch]], *, allow: bool) -> list[str]:
    """Return the arms that get no verdict and are never best; `allow` excepts those that differ in cost alone."""

    def is_allowed(mismatch: Mismatch) -> bool:
        return mismatch.is_matched or (allow and mismatch.is_cost)

    return [arm for arm, of_arm in mismatches.items() if not all(map(is_allowed, of_arm))]


def list_solved_keys(mismatches: Mapping[str, Sequence[Mismatch]]) -> tuple[str, ...]:
    """Return the settings in which arms differ because they are matched, which are no choice."""
    is_solved = any(mismatch.is_matched for of_arm in mismatches.values() for mismatch in of_arm)
    return ("train.steps",) if is_solved else ()


def compute_cost_ratio(key: str, runs: Sequence[RunResult], baseline_runs: Sequence[RunResult]) -> float | None:
    """Return the ratio of an arm's mean cost to the baseline's; None if any run lacks this cost.

    Means are over common seeds, as differences of quality are; over all seeds if there are no common ones.
    """
    common = {run.seed for run in runs} & {run.seed for run in baseline_runs}
    arms = [[run for run in of_arm if run.seed in common or not common] for of_arm in (runs, baseline_runs)]
    ours, theirs = ([run.cost.get(key, 0.0) for run in of_arm] for of_arm in arms)
    if not ours or not theirs or not all(value > 0 for value in (*ours, *theirs)):
        return None
    return fmean(ours) / fmean(theirs)


def list_matched_quantities(runs: Iterable[RunResult]) -> set[tuple[str, ...]]:
    """Return the quantities that the widths of experts were solved for; none for a dense arm."""
    quantities: set[tuple[str, ...]] = set()
    for run in runs:
        layout, router = run.config.get("layout", {}), run.config.get("router", {})
        if router.get("name") != "dense":
            by_params = layout.get("match") == "params" and layout.get("expert_width") is None
            quantities.add(PARAMS if by_params else FLOPS)
    return quantities


def _find_quantities(arms: Iterable[Iterable[RunResult]]) -> tuple[str, ...]:
    """Return the quantities that a comparison must match: those of the first arm that has experts."""
    return next((sorted(quantities)[0] for runs in arms if (quantities := list_matched_quantities(runs))), FLOPS)


def _width_mismatch(ours: tuple[str, ...], quantities: tuple[str, ...]) -> Mismatch:
    reason = (
        f"its width was solved for {SOLVED_FOR[ours]}, the comparison is by {SOLVED_FOR[quantities]} (layout.match)"
    )
    return Mismatch(mark="≠match", reason=reason)


def _check_cost(
    quantities: Sequence[str], runs: Sequence[RunResult], baseline_runs: Sequence[RunResult]
) -> Mismatch | None:
    by_params = "total_params" in quantities
    mark, subject = ("≠params", "parameters are") if by_params else ("≠FLOPs", "executed forward FLOPs per token are")
    ratios = {key: compute_cost_ratio(key, runs, baseline_runs) for key in quantities}
    unknown = [key for key, ratio in ratios.items() if ratio is None]
    if unknown:
        return Mismatch(mark=mark, reason=f"{unknown[0]} is not known for every run", is_cost=True)
    known = {key: ratio for key, ratio in ratios.items() if ratio is not None}
    if all(abs(ratio - 1) <= TOLERANCE + 1e-9 for ratio in known.values()):  # exactly 2 % is allowed
        return None
    phases = {"train_flops_per_token": " in training", "eval_flops_per_token": " in evaluation"}
    figures = ", ".join(f"{ratio:.5g} times the baseline's{phases.get(key, '')}" for key, ratio in known.items())
    backward = "" if by_params else _describe_backward(runs, baseline_runs)
    reason = f"{subject} {figures} (matched: ±{100 * TOLERANCE:.0f} %){backward}"
    return Mismatch(mark=mark, reason=reason, is_cost=True)


def _describe_backward(runs: Sequence[RunResult], baseline_runs: Sequence[RunResult]) -> str:
    """Return how training compares as a whole where backward passes cost another share, as with frozen parameters."""
    factors = {run.cost.get("train_factor", BACKWARD_FACTOR) for run in (*runs, *baseline_runs)}
    ratio = compute_training_ratio(runs, baseline_runs)
    if len(factors) == 1 or ratio is None:
        return ""
    return f"; FLOPs of all training steps, forward and backward, {ratio:.4g} times the baseline's"


def _match_training_flops(
    runs: Sequence[RunResult], baseline_runs: Sequence[RunResult], tokens: Mismatch
) -> Mismatch | None:
    """Return how an arm that was trained on other tokens is matched: by equal FLOPs of training; None if it is not."""
    ratio = compute_training_ratio(runs, baseline_runs)
    if _list_steps(runs) & _list_steps(baseline_runs):
        return None  # the tokens differ for another reason than the number of steps
    if ratio is None or abs(ratio - 1) > TOLERANCE + 1e-9:
        return None
    evaluated = compute_cost_ratio("eval_flops_per_token", runs, baseline_runs)
    in_evaluation = "" if evaluated is None else f"; FLOPs per token {evaluated:.3g} times the baseline's in evaluation"
    reason = f"matched by its FLOPs of training, {ratio:.4g} times the baseline's, not by tokens: {tokens.reason}"
    return Mismatch(mark=BY_TRAINING_FLOPS, reason=f"{reason}{in_evaluation}", is_matched=True)


def _list_steps(runs: Sequence[RunResult]) -> set[Any]:
    return {run.config.get("train", {}).get("steps") for run in runs}


def compute_training_ratio(runs: Sequence[RunResult], baseline_runs: Sequence[RunResult]) -> float | None:
    """Return the ratio of an arm's mean FLOPs of all training steps to the baseline's; None if a run lacks them."""
    totals = [[compute_training_flops(run) for run in of_arm] for of_arm in (runs, baseline_runs)]
    ours, theirs = ([total for total in of_arm if total is not None] for of_arm in totals)
    if not ours or not theirs or len(ours) < len(runs) or len(theirs) < len(baseline_runs):
        return None
    return fmean(ours) / fmean(theirs)


def _check_passes(runs: Sequence[RunResult], baseline_runs: Sequence[RunResult]) -> Mismatch | None:
    """Compare the passes of training over each token, where FLOPs are not compared."""
    passes = ([f"{run.cost.get('train_passes', 1):.0f}" for run in of_arm] for of_arm in (runs, baseline_runs))
    mismatch = _check_equal("≠passes", "train_passes", *passes)
    return None if mismatch is None else replace(mismatch, is_cost=True)


def _check_tokens(runs: Sequence[RunResult], baseline_runs: Sequence[RunResult]) -> Mismatch | None:
    """Compare seed by seed: with sequences of unequal length the number depends on the seed, not on the arm."""
    baseline = {run.seed: _format_tokens(run) for run in baseline_runs}
    pairs = [(_format_tokens(run), baseline[run.seed]) for run in runs if run.seed in baseline]
    if not pairs:
        return _check_equal("≠tokens", "train_tokens", map(_format_tokens, runs), baseline.values())
    ours, theirs = next((pair for pair in pairs if pair[0] != pair[1]), pairs[0])
    return _check_equal("≠tokens", "train_tokens", [ours], [theirs])


def _format_tokens(run: RunResult) -> str:
    tokens = run.cost.get("train_tokens")
    return "unknown" if tokens is None else f"{tokens:,.0f}"


def _check_equal(mark: str, key: str, arm: Iterable[str], baseline: Iterable[str]) -> Mismatch | None:
    ours, theirs = set(arm), set(baseline)
    if len(ours | theirs) == 1:
        return None
    return Mismatch(mark=mark, reason=f"{key} is {_join(ours)}, the baseline's {_join(theirs)}")


def _join(values: set[str]) -> str:
    return " and ".join(sorted(value[:12] for value in values))
