"""The figures of runs and experiments, drawn where the tracker and the user find them."""

import contextlib
import json
from pathlib import Path
from typing import Any

from moebench.analysis.compare.comparison import compare
from moebench.analysis.compare.curves import draw_curves
from moebench.analysis.compare.values import Comparison, Metric, Split
from moebench.analysis.specialisation.figures import draw_labels
from moebench.analysis.specialisation.load_figure import draw_load
from moebench.errors import UsageError
from moebench.experiment.grid import Experiment
from moebench.runs.folder import RunFolder
from moebench.runs.journal import read_journal
from moebench.runs.result import RunResult
from moebench.tasks.task import TASKS
from moebench.training.label_tables import read_label_tables


class Figures:
    """Draws what the experts of each run do and the curves of an experiment."""

    def draw_run_figures(self, folder: RunFolder, title: str) -> None:
        """Draw load.png, the last evaluation's load of every expert, and labels.png; nothing for a dense or failed run.

        labels.png: which expert of the trained model takes tokens of which label.
        """
        if not folder.loads.exists() or not folder.result.exists():
            return
        last = json.loads(folder.loads.read_text().splitlines()[-1])
        with contextlib.suppress(OSError):  # a full disk: a figure is no reason to stop the others
            draw_load(last["layers"], path=folder.path / "load.png", title=f"Load of the experts: {title}")
        with contextlib.suppress(OSError, UsageError):  # not there where all tokens have one label
            draw_labels(
                read_label_tables(folder.labels), path=folder.path / "labels.png", title=f"Who takes what: {title}"
            )

    def draw_experiment_figures(self, experiment: Experiment, results: Path) -> None:
        """Draw the curves of all arms, with the paired differences where they can be compared."""
        try:
            comparison = compare_experiment(experiment, results)
        except UsageError:
            comparison = None  # unmatched or without a baseline: the curves alone
        with contextlib.suppress(OSError):
            draw_experiment(experiment, results, curves_file(experiment, results), comparison)


def curves_file(experiment: Experiment, results: Path) -> Path:
    """Return where the figure of an experiment lies."""
    return results / "experiments" / experiment.name / "curves.png"


def results_of(experiment: Experiment, results: Path) -> list[RunResult]:
    """Return the results of the cells that have one, under the names of this experiment's arms."""
    found = []
    for cell in experiment.cells:
        result = RunFolder.of(results, cell.id).read_result()
        if result is not None:
            found.append(RunResult.from_dict(result.to_dict() | {"arm": cell.arm}))
    return found


def compare_experiment(
    experiment: Experiment, results: Path, *, allow_mismatch: bool = False, split: Split = "test"
) -> Comparison:
    """Compare the arms of an experiment by its task's metric; raise UsageError when there is nothing to compare."""
    facts = TASKS.get(experiment.cells[0].config.task.name).facts
    found = results_of(experiment, results)
    if not found:
        raise UsageError(f"{results}: no cell of '{experiment.name}' has a result there yet (moebench run makes them)")
    return compare(
        found,
        expected=[(cell.arm, cell.seed, cell.id) for cell in experiment.cells],
        baseline=experiment.baseline,
        metric=ComparisonMetric(name=facts.metric, lower_is_better=facts.lower_is_better, split=split),
        allow_mismatch=allow_mismatch,
    )


def draw_experiment(experiment: Experiment, results: Path, file: Path, comparison: Comparison | None) -> Path | None:
    """Draw the validation curves of every arm that has any; return the file, or None without a single point."""
    journals: dict[str, dict[int, Any]] = {}
    for cell in experiment.cells:
        points, _ = read_journal(RunFolder.of(results, cell.id).journal)
        if points:
            journals.setdefault(cell.arm, {})[cell.seed] = points
    facts = TASKS.get(experiment.cells[0].config.task.name).facts
    metric = facts.metric
    if not any(
        f"eval/{metric}" in point.metrics for seeds in journals.values() for run in seeds.values() for point in run
    ):
        return None
    return draw_curves(
        journals,
        metric=f"eval/{metric}",
        path=file,
        title=experiment.question or experiment.name,
        comparison=comparison,
        lower_is_better=facts.lower_is_better,
    )
