"""All finished runs of an experiment on tasks: their results, and the comparisons of its arms."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebench.analysis.benchmarks.comparison import OBSTACLES, TaskComparison, VerdictObstacle, compare_task
from moebench.analysis.benchmarks.measure import Benchmarks, EvaluationOptions
from moebench.analysis.benchmarks.results import TaskResult
from moebench.analysis.compare.experiment import compare_experiment, list_trained_cells
from moebench.analysis.stored_run import StoredRun, read_run
from moebench.errors import UsageError
from moebench.experiment.grid import Experiment
from moebench.runs.folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class ExperimentEvaluation:
    """The arms of an experiment on each task."""

    title: str
    comparisons: tuple[TaskComparison, ...]
    references: tuple[TaskResult, ...]
    """What token frequencies alone reach."""
    problems: tuple[str, ...]
    """Runs that are left out, with the reason."""


def evaluate_experiment(
    experiment: Experiment,
    results: Path,
    options: EvaluationOptions,
    report_progress: Callable[[str], None] = lambda line: None,
) -> ExperimentEvaluation:
    """Evaluate every finished run of an experiment and compare the arms, item by item.

    Raises UsageError when no run can be evaluated.
    """
    runs, problems = _find_runs(experiment, results)
    benchmarks = Benchmarks(options)
    evaluated: dict[str, dict[str, dict[int, TaskResult]]] = {}
    first: StoredRun | None = None
    for arm, run in runs:
        try:
            task_results = benchmarks.evaluate_run(run, results)
        except UsageError as error:
            if arm == experiment.baseline or not str(error).startswith(f"run {run.id}"):
                raise
            problems.append(f"{arm}, seed {run.seed}: {error}")
            continue
        first = first or run
        for result in task_results:
            evaluated.setdefault(result.task, {}).setdefault(arm, {})[run.seed] = result
        figures = ", ".join(f"{each.task} {each.metrics[each.main_metric]:.4f}" for each in task_results)
        report_progress(f"{arm}, seed {run.seed}: {figures}")
    if first is None:
        raise UsageError(f"{results}: no run of '{experiment.name}' can be evaluated ({problems[0]})")
    obstacles = _find_obstacles(experiment, results)
    return ExperimentEvaluation(
        title=experiment.question or experiment.name,
        comparisons=tuple(compare_task(task, arms, experiment.baseline, obstacles) for task, arms in evaluated.items()),
        references=tuple(benchmarks.compute_references(first, results)),
        problems=tuple(problems),
    )


def _find_runs(experiment: Experiment, results: Path) -> tuple[list[tuple[str, StoredRun]], list[str]]:
    """Return the finished runs with their arms, the baseline first, and what is left out."""
    runs, missing = [], dict.fromkeys(experiment.arms, 0)
    for cell in list_trained_cells(experiment, results):
        folder = RunFolder.of(results, cell.id)
        if folder.cell.exists() and folder.state() == "done":
            runs.append((cell.arm, read_run(folder)))
        else:
            missing[cell.arm] += 1
    if not runs:
        raise UsageError(f"{results}: no cell of '{experiment.name}' is done there (`moebench run` makes them)")
    runs.sort(key=lambda run: (run[0] != experiment.baseline, experiment.arms.index(run[0]), run[1].seed))
    return runs, [f"{arm}: {number} cells are not done and left out" for arm, number in missing.items() if number]


def _find_obstacles(experiment: Experiment, results: Path) -> dict[str, VerdictObstacle]:
    """Return what the comparison by the task's own metric says of each arm: divergence, unequal cost, its level."""
    comparison = compare_experiment(experiment, results)
    marks = {arm.arm: tuple(mark for mark in arm.marks if mark.startswith("≠")) for arm in comparison.arms}
    differences: Sequence[Any] = comparison.differences
    return {
        each.arm: VerdictObstacle(
            verdict=each.verdict if each.verdict in OBSTACLES else None, level=each.level, marks=marks[each.arm]
        )
        for each in differences
    }
