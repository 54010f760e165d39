"""The comparison and the figure of an experiment, from its run folders."""

from pathlib import Path
from typing import Any

from moebench.analysis.compare.comparison import compare
from moebench.analysis.compare.figure import draw_comparison
from moebench.analysis.compare.values import Comparison, ComparisonMetric, Split
from moebench.errors import UsageError
from moebench.experiment.grid import Experiment
from moebench.runs.folder import RunFolder
from moebench.runs.journal import read_journal
from moebench.runs.result import RunResult
from moebench.tasks.task import TASKS


def read_results(experiment: Experiment, results: Path) -> list[RunResult]:
    """Return the results of the cells that have one, under the names of this experiment's arms."""
    run_results = []
    for cell in experiment.cells:
        result = RunFolder.of(results, cell.id).read_result()
        if result is not None:
            run_results.append(RunResult.from_dict(result.to_dict() | {"arm": cell.arm}))
    return run_results


def compare_experiment(
    experiment: Experiment, results: Path, *, allow_mismatch: bool = False, split: Split = "test"
) -> Comparison:
    """Compare the arms of an experiment by its task's metric; raise UsageError when there is nothing to compare."""
    facts = TASKS.get(experiment.cells[0].config.task.name).facts
    run_results = read_results(experiment, results)
    if not run_results:
        raise UsageError(
            f"{results}: no cell of '{experiment.name}' has a result there yet (`moebench run` makes them)"
        )
    return compare(
        run_results,
        expected=[(cell.arm, cell.seed, cell.id) for cell in experiment.cells],
        baseline=experiment.baseline,
        metric=ComparisonMetric(name=facts.metric, lower_is_better=facts.lower_is_better, split=split),
        allow_mismatch=allow_mismatch,
    )


def draw_experiment(experiment: Experiment, results: Path, file: Path, comparison: Comparison | None) -> Path | None:
    """Draw the validation curves of every arm that has any; return the file, or None without a single point."""
    journals: dict[str, dict[int, Any]] = {}
    for cell in experiment.cells:
        folder = RunFolder.of(results, cell.id)
        points, _ = read_journal(folder.journal)
        folder.require_unchanged(folder.journal)
        if points:
            journals.setdefault(cell.arm, {})[cell.seed] = points
    facts = TASKS.get(experiment.cells[0].config.task.name).facts
    metric = f"eval/{facts.metric}"
    if not any(metric in point.metrics for seeds in journals.values() for run in seeds.values() for point in run):
        return None
    return draw_comparison(
        journals,
        metric=metric,
        path=file,
        title=experiment.question or experiment.name,
        comparison=comparison,
        lower_is_better=facts.lower_is_better,
    )
