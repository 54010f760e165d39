"""The arms of an experiment on one task, compared item by item over seeds and items."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean
from typing import Any

import numpy as np

from moebench.analysis import statistics as st
from moebench.analysis.benchmarks.results import TaskResult
from moebench.analysis.compare.verdict import Verdict

OBSTACLES: tuple[Verdict, ...] = ("diverged", "not matched")
"""Verdicts of `compare` that hold for every metric."""

OTHER_ITEMS = "≠items"
"""Mark of an arm whose runs have other items than the baseline's."""


@dataclass(frozen=True, kw_only=True)
class VerdictObstacle:
    """What `compare` says of an arm before any metric is looked at."""

    verdict: Verdict | None = None
    level: float = st.ALPHA
    """Level of the look; see the page on statistics."""
    marks: tuple[str, ...] = ()
    """Marks of `compare` that say in what the arm is not matched."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkDifference:
    """An arm minus the baseline on the main metric of a task."""

    arm: str
    seeds: tuple[int, ...]
    difference: st.CrossedDifference | None
    """None where the arms have no seed in common."""
    p_holm: float | None
    """The larger p of that over seeds and items and that by the noise of the whole table, corrected over the arms."""
    verdict: Verdict
    level: float
    marks: tuple[str, ...] = ()
    """In what an arm that is not matched differs."""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        difference = self.difference
        return {
            "seeds": list(self.seeds),
            "mean": difference.mean if difference else None,
            "interval": list(difference.interval) if difference and difference.interval else None,
            "standard_error": difference.standard_error if difference else None,
            "degrees_of_freedom": difference.df if difference else None,
            "p": difference.p if difference else None,
            "p_holm": self.p_holm,
            "level": self.level,
            "verdict": self.verdict,
            "marks": list(self.marks),
        }


@dataclass(frozen=True, kw_only=True)
class TaskComparison:
    """The arms of an experiment on one task."""

    task: str
    metric: str
    baseline: str
    results: Mapping[str, Mapping[int, TaskResult]]
    """Arm -> seed -> result."""
    differences: tuple[BenchmarkDifference, ...]

    def get_values(self, arm: str, metric: str) -> dict[int, float]:
        """Return seed -> value of a metric."""
        return {seed: result.metrics[metric] for seed, result in self.results[arm].items() if metric in result.metrics}

    @property
    def example(self) -> TaskResult:
        """Any result: all have the same items."""
        return next(result for seeds in self.results.values() for result in seeds.values())


def compare_task(
    task: str, results: Mapping[str, Mapping[int, TaskResult]], baseline: str, obstacles: Mapping[str, VerdictObstacle]
) -> TaskComparison:
    """Compare every other arm with the baseline by the main metric; arms without a result are left out.

    Arms whose runs have other items than the baseline's are `not matched`. A metric that is no mean over items is
    compared over seeds alone.
    """
    results = {arm: seeds for arm, seeds in results.items() if seeds}
    example = next(result for seeds in results.values() for result in seeds.values())
    metric = example.main_metric
    others = [arm for arm in results if arm != baseline and baseline in results]
    seeds_of = {arm: tuple(seed for seed in results[arm] if seed in results[baseline]) for arm in others}
    unmatched = [arm for arm in others if not _have_same_items(results[arm], results[baseline])]
    pairs = {
        arm: _compare_pair(results[arm], results[baseline], seeds, metric)
        for arm, seeds in seeds_of.items()
        if seeds and arm not in unmatched
    }
    p_holm = _correct(pairs, results, metric, baseline)
    differences = []
    for arm in others:
        obstacle, higher = obstacles.get(arm, VerdictObstacle()), example.is_better_if_higher(metric)
        decided = _decide(pairs.get(arm), p_holm.get(arm), obstacle.level, higher_is_better=higher)
        verdict = obstacle.verdict or ("not matched" if arm in unmatched else decided)
        marks = (*obstacle.marks, *((OTHER_ITEMS,) if arm in unmatched else ()))
        differences.append(
            BenchmarkDifference(
                arm=arm,
                seeds=seeds_of[arm],
                difference=pairs.get(arm),
                p_holm=p_holm.get(arm),
                verdict=verdict,
                level=obstacle.level,
                marks=marks if verdict == "not matched" else (),
            )
        )
    return TaskComparison(task=task, metric=metric, baseline=baseline, results=results, differences=tuple(differences))


def _have_same_items(arm: Mapping[int, TaskResult], baseline: Mapping[int, TaskResult]) -> bool:
    runs = [*arm.values(), *baseline.values()]
    return len({tuple((item.item, item.digest) for item in run.items) for run in runs}) == 1


def _compare_pair(
    arm: Mapping[int, TaskResult], baseline: Mapping[int, TaskResult], seeds: Sequence[int], metric: str
) -> st.CrossedDifference:
    """Return the difference over seeds and items, or over seeds alone for a metric that is no mean over items."""
    tables = [(arm[seed].item_values(metric), baseline[seed].item_values(metric)) for seed in seeds]
    rows = [a_I - b_I for a_I, b_I in tables if a_I is not None and b_I is not None]
    if len(rows) == len(seeds):
        return st.compute_crossed_difference(np.stack(rows), arm[seeds[0]].item_weights(metric))
    values = [[runs[seed].metrics[metric] for seed in seeds] for runs in (arm, baseline)]
    pair = st.compute_paired_difference(*values)
    return st.CrossedDifference(
        mean=pair.mean,
        interval=pair.interval,
        p=pair.p,
        standard_error=None if pair.sd is None else pair.sd / sqrt(len(seeds)),
        df=len(seeds) - 1,
        num_seeds=len(seeds),
        num_items=1,
    )


def _correct(
    pairs: Mapping[str, st.CrossedDifference],
    results: Mapping[str, Mapping[int, TaskResult]],
    metric: str,
    baseline: str,
) -> dict[str, float]:
    """Return the p value of each arm, corrected by Holm: no arm gains from a few seeds that happen to agree."""
    tested = {arm: pair for arm, pair in pairs.items() if pair.p is not None}
    seeds = [seed for seed in results.get(baseline, {}) if all(seed in results[arm] for arm in tested)]
    spread = None
    if tested and len(seeds) >= st.MIN_SEEDS:
        values = {arm: [results[arm][seed].metrics[metric] for seed in seeds] for arm in (*tested, baseline)}
        varying = [values[arm] for arm in tested if np.ptp(np.subtract(values[arm], values[baseline])) > 0]
        spread = st.table_spread(varying, values[baseline]) if varying else None
    p_values = {}
    for arm, pair in tested.items():
        pooled = st.spread_p(pair.mean, spread, pair.num_seeds) if spread else 0.0
        p_values[arm] = max(pair.p or 0.0, pooled)
    return st.correct_family(p_values)


def _decide(
    pair: st.CrossedDifference | None, p_holm: float | None, level: float, *, higher_is_better: bool
) -> Verdict:
    if pair is None or pair.num_seeds < st.MIN_SEEDS:
        return "too few seeds"
    if p_holm is not None and p_holm <= level:
        return "better" if (pair.mean > 0) == higher_is_better else "worse"
    return "undecided"


def average(comparison: TaskComparison, arm: str, metric: str) -> tuple[float, st.Interval | None] | None:
    """Return the mean of a metric over the seeds of an arm with its interval; None without a value."""
    values = [*comparison.get_values(arm, metric).values()]
    return (fmean(values), st.mean_interval(values)) if values else None
