"""The results of a grid, sorted: which cells are finished, which failed and why, which are missing."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite

from moebench.analysis.compare.values import LostCell, Metric
from moebench.errors import UsageError, unknown
from moebench.runs.result import Fault, RunResult

Expected = Sequence[tuple[str, int, str]]  # (arm, seed, cell id)


@dataclass(frozen=True, kw_only=True)
class Sorted:
    """Every expected cell in one of three places; `done` maps arm -> seed -> result, seeds ascending."""

    metric: Metric
    baseline: str
    done: Mapping[str, Mapping[int, RunResult]]
    failed: tuple[LostCell, ...]
    missing: tuple[LostCell, ...]
    foreign: tuple[str, ...]  # ids of results that no expected cell asked for

    @property
    def arms(self) -> tuple[str, ...]:
        """Every expected arm, in the order of the grid, finished or not."""
        return tuple(self.done)

    def common_seeds(self, arm: str) -> tuple[int, ...]:
        """Return the seeds that both the arm and the baseline have finished."""
        return tuple(seed for seed in self.done[arm] if seed in self.done[self.baseline])

    def quality(self, arm: str, seeds: Sequence[int]) -> list[float]:
        """Return the final metric of an arm for these seeds."""
        return [self.done[arm][seed].metrics[self.metric.name] for seed in seeds]

    def num_diverged(self, arm: str) -> int:
        """Return how many seeds of an arm diverged."""
        return sum(cell.arm == arm and cell.diverged for cell in self.failed)


def sort_results(results: Sequence[RunResult], expected: Expected, *, baseline: str, metric: Metric) -> Sorted:
    """Sort the expected cells, with the metrics of the wanted split.

    Raises UsageError for an unknown baseline or metric, a cell named twice and results without the wanted split.
    """
    done: dict[str, dict[int, RunResult]] = {arm: {} for arm, _, _ in expected}
    if baseline not in done:
        raise unknown("baseline", baseline, done)
    if len({(arm, seed) for arm, seed, _ in expected}) < len(expected):
        raise UsageError("an arm has the same seed twice in this grid; give each configuration its own arm name")
    _refuse_copies(results, expected)
    results = _of_split(results, metric)
    by_id = {result.id: result for result in results}
    _require_metric(results, metric.name)
    failed, missing = [], []
    for arm, seed, cell_id in sorted(expected, key=lambda cell: cell[1]):
        result = by_id.get(cell_id)
        if result is None:
            missing.append(LostCell(arm=arm, seed=seed, id=cell_id, reason="no result yet", diverged=False))
        elif reason := _fault(result, metric.name):
            diverged = _has_diverged(result, metric.name)
            failed.append(LostCell(arm=arm, seed=seed, id=cell_id, reason=reason, diverged=diverged))
        else:
            done[arm][seed] = result
    return Sorted(
        metric=metric,
        baseline=baseline,
        done=done,
        failed=tuple(failed),
        missing=tuple(missing),
        foreign=tuple(sorted(by_id.keys() - {cell_id for _, _, cell_id in expected})),
    )


def _refuse_copies(results: Sequence[RunResult], expected: Expected) -> None:
    """Refuse one run under two names: compared with itself, or counted twice by Holm, it says nothing."""
    seen: dict[str, tuple[str, int]] = {}
    for arm, seed, cell_id in expected:
        if cell_id in seen:
            other, other_seed = seen[cell_id]
            raise UsageError(
                f"arms '{other}' (seed {other_seed}) and '{arm}' (seed {seed}) are one and the same cell, {cell_id};"
                " leave one of them out"
            )
        seen[cell_id] = arm, seed
    for cell_id, times in Counter(result.id for result in results).items():
        if times > 1:
            raise UsageError(f"{cell_id}: {times} results of one cell are given; which of them counts?")


def _of_split(results: Sequence[RunResult], metric: Metric) -> list[RunResult]:
    """Return the results with the metrics of the split that is compared on as their metrics."""
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
        raise unknown("metric", metric, reported)


def _has_diverged(result: RunResult, metric: str) -> bool:
    if result.status != "done":
        return result.fault == Fault.DIVERGED
    return not isfinite(result.metrics.get(metric, 0.0))


def _fault(result: RunResult, metric: str) -> str | None:
    """Say why a result cannot be used, None when it can."""
    if result.status != "done":
        return result.error or f"{result.status} at step {result.step}"
    if metric not in result.metrics:
        return f"reports no {metric}"
    value = result.metrics[metric]
    return None if isfinite(value) else f"{metric} is {value} after {result.step} steps"
