"""The results of a grid by arm and seed, with the cells that failed or are missing."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite

from moebench.analysis.compare.values import ComparisonMetric, LostCell
from moebench.analysis.design.levels import Level, compute_level, describe_levels
from moebench.errors import UsageError, build_unknown_error
from moebench.experiment.seed_plan import SeedPlan
from moebench.runs.result import Fault, RunResult

Expected = Sequence[tuple[str, int, str]]
"""Arm, seed and id of every cell."""


@dataclass(frozen=True, kw_only=True)
class ResultGrid:
    """Every expected cell as done, failed or missing."""

    metric: ComparisonMetric
    baseline: str
    done: Mapping[str, Mapping[int, RunResult]]
    """Arm -> seed -> result, seeds ascending; arms in the order of the grid."""
    failed: tuple[LostCell, ...]
    missing: tuple[LostCell, ...]
    unexpected: tuple[str, ...]
    """Ids of results that belong to no expected cell."""
    ended: Mapping[str, frozenset[int]]
    """Arm -> its seeds with an outcome, done or failed."""
    plan: SeedPlan = field(default_factory=SeedPlan)
    """Planned seeds; an empty plan gives every look the full level."""

    @property
    def arms(self) -> tuple[str, ...]:
        """Every expected arm, in the order of the grid, finished or not."""
        return tuple(self.done)

    def common_seeds(self, arm: str) -> tuple[int, ...]:
        """Return the seeds finished by both the arm and the baseline."""
        return tuple(seed for seed in self.done[arm] if seed in self.done[self.baseline])

    def choose_level(self, arm: str, num_comparisons: int) -> Level:
        """Return the level of the verdict on an arm, by the seeds that it and the baseline have an outcome of."""
        return compute_level(self.plan, self.ended[arm] & self.ended[self.baseline], num_comparisons)

    def get_quality(self, arm: str, seeds: Sequence[int]) -> list[float]:
        """Return the final metric of an arm for these seeds."""
        return [self.done[arm][seed].metrics[self.metric.name] for seed in seeds]

    def count_diverged(self, arm: str) -> int:
        """Return the number of seeds of an arm that diverged."""
        return sum(cell.arm == arm and cell.diverged for cell in self.failed)


def note_levels(grid: ResultGrid, num_comparisons: int) -> list[str]:
    """Return in one line at which level arms get verdicts, where that is not the full one."""
    arms = [arm for arm in grid.arms if arm != grid.baseline and grid.common_seeds(arm)]
    return describe_levels((arm, grid.choose_level(arm, num_comparisons)) for arm in arms)


def arrange_results(
    results: Sequence[RunResult], expected: Expected, *, baseline: str, metric: ComparisonMetric
) -> ResultGrid:
    """Return the expected cells with their results, whose metrics are those of the metric's split.

    Raises UsageError for an unknown baseline or metric, a cell named twice and results without metrics of the split.
    """
    done: dict[str, dict[int, RunResult]] = {arm: {} for arm, _, _ in expected}
    if baseline not in done:
        raise build_unknown_error("baseline", baseline, done)
    if len({(arm, seed) for arm, seed, _ in expected}) < len(expected):
        raise UsageError("an arm has the same seed twice in this grid; give each configuration its own arm name")
    _check_unique(results, expected)
    results = _select_split(results, metric)
    by_id = {result.id: result for result in results}
    _require_metric(results, metric.name)
    failed, missing = [], []
    for arm, seed, cell_id in sorted(expected, key=lambda cell: cell[1]):
        result = by_id.get(cell_id)
        if result is None:
            missing.append(LostCell(arm=arm, seed=seed, id=cell_id, reason="no result yet", diverged=False))
        elif reason := _describe_fault(result, metric.name):
            diverged = _has_diverged(result, metric.name)
            failed.append(LostCell(arm=arm, seed=seed, id=cell_id, reason=reason, diverged=diverged))
        else:
            done[arm][seed] = result
    return ResultGrid(
        metric=metric,
        baseline=baseline,
        done=done,
        failed=tuple(failed),
        missing=tuple(missing),
        ended={arm: frozenset({*done[arm], *(cell.seed for cell in failed if cell.arm == arm)}) for arm in done},
        unexpected=tuple(sorted(by_id.keys() - {cell_id for _, _, cell_id in expected})),
    )


def _check_unique(results: Sequence[RunResult], expected: Expected) -> None:
    """Raise UsageError for one run under two names: it would be compared with itself, or counted twice by Holm."""
    seen: dict[str, tuple[str, int]] = {}
    for arm, seed, cell_id in expected:
        if cell_id in seen:
            other, other_seed = seen[cell_id]
            raise UsageError(
                f"arms '{other}' (seed {other_seed}) and '{arm}' (seed {seed}) are the same cell, {cell_id};"
                " leave one of them out"
            )
        seen[cell_id] = arm, seed
    for cell_id, times in Counter(result.id for result in results).items():
        if times > 1:
            raise UsageError(f"{cell_id}: {times} results of one cell are given; give one")


def _select_split(results: Sequence[RunResult], metric: ComparisonMetric) -> list[RunResult]:
    """Return the results with the metrics of the compared split in `metrics`."""
    if metric.split == "test":
        return list(results)
    without = [result for result in results if result.status == "done" and not result.validation]
    if without:
        first = without[0]
        raise UsageError(
            f"--split validation: {len(without)} of {len(results)} results have no validation metrics, first"
            f" {first.arm}, seed {first.seed} ({first.id}): delete its result.json and run the experiment again, which"
            " evaluates the last checkpoint"
        )
    return [replace(result, metrics=result.validation) for result in results]


def _require_metric(results: Sequence[RunResult], metric: str) -> None:
    reported = {name for result in results if result.status == "done" for name in result.metrics}
    if reported and metric not in reported:
        raise build_unknown_error("metric", metric, reported)


def _has_diverged(result: RunResult, metric: str) -> bool:
    if result.status != "done":
        return result.fault == Fault.DIVERGED
    return not isfinite(result.metrics.get(metric, 0.0))


def _describe_fault(result: RunResult, metric: str) -> str | None:
    """Return the reason why a result cannot be used; None when it can."""
    if result.status != "done":
        return result.error or f"{result.status} at step {result.step}"
    if metric not in result.metrics:
        return f"reports no {metric}"
    value = result.metrics[metric]
    return None if isfinite(value) else f"{metric} is {value} after {result.step} steps"
