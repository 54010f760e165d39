"""The figures of runs and experiments, drawn into their folders, from where the tracker takes them.

Drawing is imported when the first figure is drawn, so that an import that fails costs the figures alone.
"""

import contextlib
import json
from pathlib import Path

from moebench.errors import UsageError
from moebench.experiment.grid import Experiment
from moebench.runs.folder import RunFolder


class Figures:
    """Draws the load and the specialisation of the experts of each run, and the curves of an experiment."""

    def draw_run_figures(self, folder: RunFolder, title: str) -> None:
        """Draw load.png and labels.png; nothing for a dense or failed run.

        load.png: load of every expert in the last evaluation. labels.png: share of each label that each expert of the
        trained model takes; left out where all tokens have one label.
        """
        if not folder.loads.exists() or not folder.result.exists():
            return
        from moebench.analysis.specialisation.figures import draw_labels, draw_load
        from moebench.training.label_tables import read_label_tables

        if lines := folder.loads.read_text(encoding="utf-8").splitlines():
            layers = json.loads(lines[-1])["layers"]
            draw_load(layers, path=folder.path / "load.png", title=f"Load of the experts: {title}")
        with contextlib.suppress(UsageError):
            draw_labels(
                read_label_tables(folder.labels), path=folder.path / "labels.png", title=f"Who takes what: {title}"
            )

    def draw_experiment_figures(self, experiment: Experiment, results: Path) -> None:
        """Write the summary of the comparison, and draw the curves with the paired differences where there are any."""
        from moebench.analysis.compare.experiment import compare_experiment, draw_experiment
        from moebench.analysis.compare.summary import build_summary
        from moebench.runs.experiment_summary import write_summary

        try:
            comparison = compare_experiment(experiment, results)
        except UsageError:
            comparison = None  # unmatched or without a baseline: the curves alone
        if comparison is not None:
            write_summary(results, experiment.name, build_summary(comparison))
        file = results / "experiments" / experiment.name / "curves.png"
        draw_experiment(experiment, results, file, comparison)
