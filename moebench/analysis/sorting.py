"""The results of a grid, sorted: which cells are finished, which failed and why, which are missing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

from moebench.analysis.values import LostCell
from moebench.errors import UsageError, unknown
from moebench.training.result import RunResult

Expected = Sequence[tuple[str, int, str]]  # (arm, seed, cell id)


@dataclass(frozen=True, kw_only=True)
class Sorted:
    """Every expected cell in one of three places; `done` maps arm -> seed -> result, seeds ascending."""

    metric: str
    lower_is_better: bool
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
        return [self.done[arm][seed].metrics[self.metric] for seed in seeds]


def sort_results(
    results: Sequence[RunResult], expected: Expected, *, baseline: str, metric: str, lower_is_better: bool
) -> Sorted:
    """Sort the expected cells; raises UsageError for an unknown baseline or metric and a cell named twice."""
    by_id = {result.id: result for result in results}
    done: dict[str, dict[int, RunResult]] = {arm: {} for arm, _, _ in expected}
    if baseline not in done:
        raise unknown("baseline", baseline, done)
    if len({(arm, seed) for arm, seed, _ in expected}) < len(expected):
        raise UsageError("an arm has the same seed twice in this grid; give each configuration its own arm name")
    _require_metric(results, metric)
    failed, missing = [], []
    for arm, seed, cell_id in sorted(expected, key=lambda cell: cell[1]):
        result = by_id.get(cell_id)
        if result is None:
            missing.append(LostCell(arm=arm, seed=seed, id=cell_id, reason="no result yet"))
        elif fault := _fault(result, metric):
            failed.append(LostCell(arm=arm, seed=seed, id=cell_id, reason=fault))
        else:
            done[arm][seed] = result
    return Sorted(
        metric=metric,
        lower_is_better=lower_is_better,
        baseline=baseline,
        done=done,
        failed=tuple(failed),
        missing=tuple(missing),
        foreign=tuple(sorted(by_id.keys() - {cell_id for _, _, cell_id in expected})),
    )


def _require_metric(results: Sequence[RunResult], metric: str) -> None:
    reported = {name for result in results if result.status == "done" for name in result.metrics}
    if reported and metric not in reported:
        raise unknown("metric", metric, reported)


def _fault(result: RunResult, metric: str) -> str | None:
    """Say why a result cannot be used, None when it can."""
    if result.status != "done":
        return result.error or f"{result.status} at step {result.step}"
    if metric not in result.metrics:
        return f"reports no {metric}"
    value = result.metrics[metric]
    return None if isfinite(value) else f"{metric} is {value} after {result.step} steps"
