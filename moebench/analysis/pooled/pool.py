"""Pool the comparisons of several experiments: is an arm better on these tasks, and across tasks?"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from scipy import stats

from moebench.analysis import statistics as st
from moebench.analysis.compare.values import Comparison, Difference
from moebench.analysis.pooled.sign_flips import ScaledPairs, compute_effect, invert_test, sign_flip_p
from moebench.errors import UsageError

MIN_TASKS = 3
"""With fewer experiments, their means say nothing about further ones."""
PooledVerdict = Literal["better", "worse", "undecided", "diverged", "too few pairs"]


@dataclass(frozen=True, kw_only=True)
class TaskEffect:
    """An arm in one experiment."""

    experiment: str
    pairs: int
    mean: float | None
    """Arm minus baseline, in the unit of the metric."""
    effect: float | None
    """In SDs of the paired difference, positive where the arm is better; None where the experiment does not count."""
    verdict: str
    """Verdict in this experiment alone."""
    reason: str = ""
    """Why it does not count; empty if it does."""
    level: float = st.ALPHA
    """Level of its verdict: below the full level at a look that was not planned."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean effect in SDs of the paired difference, with interval and test."""

    effect: float
    interval: st.Interval | None
    p: float | None
    p_holm: float | None = None


@dataclass(frozen=True, kw_only=True)
class PooledArm:
    """One arm over all experiments that have it."""

    arm: str
    tasks: Mapping[str, TaskEffect]
    """Experiment -> effect, without experiments that do not have the arm."""
    fixed: Estimate | None
    """Over the pairs of these experiments."""
    across: Estimate | None
    """Estimate with the experiment as the unit: t interval and test of their means; None with fewer than 3."""
    verdict: PooledVerdict

    @property
    def counted(self) -> list[TaskEffect]:
        """Return the experiments that count."""
        return [task for task in self.tasks.values() if not task.reason]

    @property
    def num_pairs(self) -> int:
        """Number of pairs over the experiments that count."""
        return sum(task.pairs for task in self.counted)

    @property
    def level(self) -> float:
        """Level of the verdict: the strictest of the experiments that count."""
        return min((task.level for task in self.counted), default=st.ALPHA)


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """Several experiments with one baseline, pooled."""

    baseline: str
    experiments: Mapping[str, Comparison]
    arms: tuple[PooledArm, ...]
    scales: Mapping[str, float | None]
    """Experiment -> the pooled SD of its paired differences, in the unit of its metric; None where it is unknown."""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "baseline": self.baseline,
            "experiments": {
                name: {
                    "metric": comparison.metric,
                    "split": comparison.split,
                    "lower_is_better": comparison.lower_is_better,
                    "sd_of_paired_difference": self.scales[name],
                    "below_trivial_baselines": comparison.is_below_trivial,
                }
                for name, comparison in self.experiments.items()
            },
            "arms": {
                arm.arm: {
                    "verdict": arm.verdict,
                    "pairs": arm.num_pairs,
                    "level": arm.level,
                    "fixed": asdict(arm.fixed) if arm.fixed else None,
                    "across_tasks": asdict(arm.across) if arm.across else None,
                    "tasks": {name: asdict(task) for name, task in arm.tasks.items()},
                }
                for arm in self.arms
            },
        }


def pool_comparisons(comparisons: Mapping[str, Comparison]) -> Pooled:
    """Pool comparisons, by the names of their experiments; raise UsageError for different baselines."""
    baselines = {name: comparison.baseline for name, comparison in comparisons.items()}
    if len(set(baselines.values())) > 1:
        given = ", ".join(f"{baseline} in {name}" for name, baseline in baselines.items())
        raise UsageError(f"compare: the experiments have different baselines ({given}); choose one with baseline=ARM")
    scales = {name: _find_scale(comparison) for name, comparison in comparisons.items()}
    names = dict.fromkeys(pair.arm for comparison in comparisons.values() for pair in comparison.differences)
    arms = [_pool_arm(arm, comparisons, scales) for arm in names]
    return Pooled(
        baseline=next(iter(baselines.values())), experiments=comparisons, arms=tuple(_correct(arms)), scales=scales
    )


def _find_scale(comparison: Comparison) -> float | None:
    """Return the SD of the paired differences of an experiment, pooled over its arms with 3 common seeds or more."""
    values = {arm.arm: arm.values for arm in comparison.arms}
    arms = [pair.arm for pair in comparison.differences if len(pair.seeds) >= st.MIN_SEEDS]
    spread = st.pool_arms({arm: values[arm] for arm in arms}, values[comparison.baseline])
    return spread.sd if spread else None


def _pool_arm(arm: str, comparisons: Mapping[str, Comparison], scales: Mapping[str, float | None]) -> PooledArm:
    tasks: dict[str, TaskEffect] = {}
    pairs: list[ScaledPairs] = []
    for name, comparison in comparisons.items():
        difference = comparison.find_difference(arm)
        if difference is None:
            continue
        reason = _find_obstacle(difference, scales[name])
        scaled = _scale_pairs(comparison, difference, scales[name] or 1.0)
        tasks[name] = TaskEffect(
            experiment=name,
            pairs=len(difference.seeds),
            mean=difference.mean,
            effect=None if reason else compute_effect([scaled]),
            verdict=comparison.describe_verdict(arm),
            reason=reason,
            level=difference.level,
        )
        if not reason:
            pairs.append(scaled)
    is_diverged = any(task.reason == "diverged" for task in tasks.values())
    fixed = Estimate(effect=compute_effect(pairs), interval=invert_test(pairs), p=sign_flip_p(pairs)) if pairs else None
    effects = [task.effect for task in tasks.values() if task.effect is not None]
    return PooledArm(
        arm=arm,
        tasks=tasks,
        fixed=fixed,
        across=_test_across(effects),
        verdict="diverged" if is_diverged else "too few pairs",
    )


def _find_obstacle(difference: Difference, scale: float | None) -> str:
    """Return why an experiment does not count for an arm; empty if it does."""
    if "diverged" in difference.verdict:
        return "diverged"
    if difference.verdict == "not matched":
        return "not matched"
    if len(difference.seeds) < st.MIN_SEEDS:
        return "too few seeds"
    return "" if scale else "no spread between seeds"


def _scale_pairs(comparison: Comparison, difference: Difference, scale: float) -> ScaledPairs:
    values = {arm.arm: arm.values for arm in comparison.arms}
    sign = -1.0 if comparison.lower_is_better else 1.0

    def subtract(pair: Difference) -> st.Values:
        rows = [(values[pair.arm][seed], values[pair.baseline][seed]) for seed in pair.seeds]
        return sign * np.array([ours - theirs for ours, theirs in rows], dtype=np.float64)

    others = [subtract(pair) for pair in comparison.differences if pair.arm != difference.arm]
    return ScaledPairs(
        difference_S=subtract(difference),
        scale=scale,
        other_square_sum=float(sum((other_S**2).sum() for other_S in others)),
        num_others=sum(other_S.size for other_S in others),
    )


def _test_across(effects: Sequence[float]) -> Estimate | None:
    """Return the mean over experiments, each one a unit, with t interval and t test."""
    if len(effects) < MIN_TASKS or max(effects) == min(effects):
        return None
    test = stats.ttest_1samp(effects, 0.0)
    low, high = test.confidence_interval(st.CONFIDENCE)
    return Estimate(effect=float(np.mean(effects)), interval=(float(low), float(high)), p=float(test.pvalue))


def _correct(arms: Sequence[PooledArm]) -> list[PooledArm]:
    """Return the arms with p values corrected by Holm, and their verdicts."""
    corrected = []
    families = {}
    for name in ("fixed", "across"):
        tested = {arm.arm: estimate.p for arm in arms if (estimate := getattr(arm, name)) and estimate.p is not None}
        families[name] = st.correct_family(tested)
    for arm in arms:
        fixed = replace(arm.fixed, p_holm=families["fixed"].get(arm.arm)) if arm.fixed else None
        across = replace(arm.across, p_holm=families["across"].get(arm.arm)) if arm.across else None
        verdict = arm.verdict if arm.verdict == "diverged" or fixed is None else _judge(fixed, arm)
        corrected.append(replace(arm, fixed=fixed, across=across, verdict=verdict))
    return corrected


def _judge(fixed: Estimate, arm: PooledArm) -> PooledVerdict:
    if arm.num_pairs < st.EXACT_SEEDS:
        return "too few pairs"
    if fixed.p_holm is None or fixed.p_holm > arm.level:
        return "undecided"
    return "better" if fixed.effect > 0 else "worse"
