"""Compare arms with the baseline at equal tokens, FLOPs, parameters and time, from the curves of their runs.

All values are of the validation split, on which runs are evaluated while they train; verdicts are those of the final
models on the test split.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from statistics import fmean

from moebench.analysis import statistics as st
from moebench.analysis.fairness.conditions import RunConditions, find_time_problem
from moebench.analysis.fairness.parameters import EqualParameters, Runs, count_parameters, find_equal_parameters
from moebench.analysis.fairness.run_curve import TOLERANCE, Axis, RunCurve
from moebench.analysis.fairness.speed_up import SpeedUp, compute_speed_up
from moebench.analysis.fairness.values import (
    EQUAL,
    EQUAL_NAMES,
    NOT_RUN,
    ArmFairness,
    ArmTotals,
    Equal,
    EqualBudget,
    Fairness,
)
from moebench.analysis.training_flops import compute_training_flops
from moebench.reporting.formatting import format_plural

MIN_EVALUATIONS = 5
"""Fewest evaluations of a run: with fewer, interpolation between them is too coarse."""
SPEED_AXES: tuple[Axis, ...] = ("steps", "flops", "seconds")
Curves = Mapping[int, RunCurve]


@dataclass(frozen=True, kw_only=True)
class MeasuredArms:
    """The finished runs of all arms: arm -> seed -> value."""

    metric: str
    lower_is_better: bool
    baseline: str
    runs: Mapping[str, Runs]
    curves: Mapping[str, Curves]
    """Curves of each arm by seed; runs without a curve are left out."""
    conditions: Mapping[str, Mapping[int, RunConditions]]
    divergence: Mapping[str, str]
    """Arm -> how many of its seeds, or of the baseline's, diverged."""
    num_steps: int
    """Steps of a run, for the advice on how often to evaluate."""


def compare_on_axes(arms: MeasuredArms, *, ignore_conditions: bool = False) -> Fairness:
    """Return the comparison on all axes; `ignore_conditions`: compare times measured differently too, with a note."""
    others = [arm for arm in arms.runs if arm != arms.baseline]
    compared = _correct([_compare_arm(arms, arm, ignore_conditions=ignore_conditions) for arm in others])
    num_evaluations = min((c.num_points for of_arm in arms.curves.values() for c in of_arm.values()), default=0)
    return Fairness(
        metric=arms.metric,
        lower_is_better=arms.lower_is_better,
        baseline=arms.baseline,
        arms=tuple(compared),
        totals=tuple(_sum_up(arms, arm) for arm in arms.runs),
        num_evaluations=num_evaluations,
        notes=tuple(_list_notes(arms, compared, num_evaluations)),
    )


def _compare_arm(arms: MeasuredArms, arm: str, *, ignore_conditions: bool) -> ArmFairness:
    ours, theirs = arms.curves[arm], arms.curves[arms.baseline]
    seeds = tuple(seed for seed in ours if seed in theirs)
    conditions = [arms.conditions[name][seed] for name in (arm, arms.baseline) for seed in seeds]
    problem = find_time_problem(conditions) if seeds else ""
    reference = find_equal_parameters(arm, arms.runs, arms.baseline, arms.metric)
    ours, theirs = ({seed: curves[seed] for seed in seeds} for curves in (ours, theirs))
    time = _compare_at_budget(ours, theirs, "seconds")
    if problem:
        time = replace(time if ignore_conditions else EqualBudget(problem="not comparable"), note=f"time: {problem}")
    speed_up: dict[Axis, SpeedUp] = {}
    for axis in SPEED_AXES:
        ratio = compute_speed_up(ours, theirs, axis, lower_is_better=arms.lower_is_better)
        if ratio is not None and _has_enough_points(ours, theirs) and (axis != "seconds" or not problem):
            speed_up[axis] = ratio
    return ArmFairness(
        arm=arm,
        seeds=seeds,
        equal={
            "tokens": _compare_at_budget(ours, theirs, "tokens"),
            "flops": _compare_at_budget(ours, theirs, "flops"),
            "parameters": _compare_with_reference(arms, arm, reference),
            "seconds": time,
        },
        speed_up=speed_up,
        divergence=arms.divergence.get(arm, ""),
    )


def _compare_at_budget(ours: Curves, theirs: Curves, axis: Axis) -> EqualBudget:
    """Compare the arm, read where it has spent what the baseline of the same seed has spent in all, with its end."""
    if not ours:
        return EqualBudget(problem="no pair of curves")
    if any(axis not in curve.budgets for curve in (*ours.values(), *theirs.values())):
        return EqualBudget(problem="not measured")
    budgets = {seed: float(theirs[seed].budgets[axis][-1]) for seed in ours}
    shares = {seed: float(curve.budgets[axis][-1]) / budgets[seed] for seed, curve in ours.items()}
    if max(shares.values()) > 1 + TOLERANCE and not _has_enough_points(ours, theirs):
        return EqualBudget(problem="too few evaluations")
    values = [curve.read_at(axis, budgets[seed]) for seed, curve in ours.items()]
    missing = values.count(None)
    if missing:
        short = [share for seed, share in shares.items() if not ours[seed].has_spent(axis, budgets[seed])]
        where = f" in {len(short) or missing} of {len(ours)}" if (len(short) or missing) < len(ours) else ""
        if not short:
            return EqualBudget(problem=f"before the first evaluation{where}")
        return EqualBudget(problem=f"not reached{where}, ended at {fmean(short):.2f}×")
    baseline = [float(theirs[seed].value_P[-1]) for seed in ours]
    return EqualBudget(pair=st.compute_paired_difference([value for value in values if value is not None], baseline))


def _has_enough_points(ours: Curves, theirs: Curves) -> bool:
    return min((curve.num_points for curves in (ours, theirs) for curve in curves.values()), default=0) >= (
        MIN_EVALUATIONS
    )


def _compare_with_reference(arms: MeasuredArms, arm: str, reference: EqualParameters | None) -> EqualBudget:
    if reference is None:
        return EqualBudget(problem=NOT_RUN)
    ours = {seed: run.validation[arms.metric] for seed, run in arms.runs[arm].items() if arms.metric in run.validation}
    seeds = [seed for seed in ours if seed in reference.values]
    if not seeds:
        return EqualBudget(problem="no seed in common")
    pair = st.compute_paired_difference([ours[seed] for seed in seeds], [reference.values[seed] for seed in seeds])
    return EqualBudget(pair=pair, note=reference.note)


def _correct(arms: list[ArmFairness]) -> list[ArmFairness]:
    """Return the arms with p values corrected by Holm, each axis as a family."""
    corrected: dict[tuple[str, Equal], EqualBudget] = {}
    for name in EQUAL:
        tested = {arm.arm: pair.p for arm in arms if (pair := arm.equal[name].pair) and pair.p is not None}
        p_holm = st.correct_family(tested)
        corrected |= {(arm.arm, name): replace(arm.equal[name], p_holm=p_holm.get(arm.arm)) for arm in arms}
    return [replace(arm, equal={name: corrected[arm.arm, name] for name in EQUAL}) for arm in arms]


def _sum_up(arms: MeasuredArms, arm: str) -> ArmTotals:
    runs = list(arms.runs[arm].values())
    flops = [total for run in runs if (total := compute_training_flops(run)) is not None]
    seconds = [run.throughput["train_s"] for run in runs if run.throughput.get("train_s", 0.0) > 0]
    active = [run.cost["active_params"] for run in runs if "active_params" in run.cost]
    return ArmTotals(
        arm=arm,
        active_params=fmean(active) if active else None,
        total_params=count_parameters(arms.runs[arm]),
        flops=fmean(flops) if flops else None,
        seconds=fmean(seconds) if seconds else None,
    )


def _list_notes(arms: MeasuredArms, compared: Collection[ArmFairness], num_evaluations: int) -> list[str]:
    notes: dict[str, list[str]] = {}
    for arm in compared:
        for name in EQUAL:
            if arm.equal[name].note:
                notes.setdefault(arm.equal[name].note, []).append(arm.arm)
    lines = [f"{', '.join(names)}: {note}" for note, names in notes.items()]
    if 0 < num_evaluations < MIN_EVALUATIONS:
        every = max(arms.num_steps // 20, 1)
        is_too_short = arms.num_steps < MIN_EVALUATIONS
        remedy = f"train.steps={MIN_EVALUATIONS} or more" if is_too_short else f"train.eval_every={every}"
        lines.append(
            f"only {format_plural(num_evaluations, 'evaluation')} of a run: equal budgets and speed-ups are read"
            f" between evaluations and need {MIN_EVALUATIONS}; train with {remedy}"
        )
    if any(arm.equal["seconds"].pair and _is_slower(arms, arm.arm) for arm in compared):
        lines.append(
            "slower arms are compared at equal time before their learning rate has decayed: a run with that many"
            " steps would end better"
        )
    return lines


def _is_slower(arms: MeasuredArms, arm: str) -> bool:
    """Return whether an arm needs more time than the baseline for the same steps."""
    ours, theirs = (
        [total for curve in arms.curves[name].values() if (total := curve.total("seconds")) is not None]
        for name in (arm, arms.baseline)
    )
    return bool(ours and theirs) and fmean(ours) > (1 + TOLERANCE) * fmean(theirs)


def describe_arm(fairness: Fairness, arm: ArmFairness) -> str:
    """Return one sentence on an arm: what is shown at equal tokens, FLOPs, parameters and time."""
    if arm.divergence:
        return f"{arm.arm}: {arm.divergence}, so the other seeds are a biased sample"
    parts: dict[str, list[str]] = {}
    for name in EQUAL:
        outcome = arm.equal[name].describe(lower_is_better=fairness.lower_is_better)
        parts.setdefault(outcome, []).append(EQUAL_NAMES[name])
    outcomes = "; ".join(f"{outcome} at equal {', '.join(names)}" for outcome, names in parts.items())
    return f"{arm.arm} against {fairness.baseline}: {outcomes}"
