"""The figures of runs and experiments, drawn into their folders, from where the tracker takes them.

Drawing is imported when the first figure is drawn, so that an import that fails costs the figures alone.
"""

import contextlib
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moebench.errors import UsageError
from moebench.experiment.grid import Experiment
from moebench.file_access import read_plain_file
from moebench.runs.experiment_record import read_record
from moebench.runs.folder import RunFolder

if TYPE_CHECKING:
    from moebench.analysis.compare.values import Comparison


class Figures:
    """Draws the load and the specialisation of the experts of each run, the curves and the report of an experiment."""

    def __init__(self, command: str = "") -> None:
        self.command = command
        """The command that trains the experiment again, for its report; empty: not known."""

    def draw_run_figures(self, folder: RunFolder, title: str) -> None:
        """Draw load.png, load_steps.png, layers.png and labels.png; nothing for a dense or failed run.

        load.png: load of every expert in the last evaluation. load_steps.png: over the logged training steps.
        layers.png: curves of each layer. labels.png: share of each label that each expert of the trained model takes;
        left out where all tokens have one label.
        """
        if not folder.loads.exists() or not folder.result.exists():
            return
        from moebench.analysis.layer_figures import draw_layer_curves, draw_load_maps
        from moebench.analysis.specialisation.figures import draw_labels, draw_load
        from moebench.runs.layer_series import read_thinned_series
        from moebench.training.label_tables import read_label_tables

        if lines := read_plain_file(folder.loads, None).splitlines():
            layers = json.loads(lines[-1])["layers"]
            draw_load(layers, path=folder.path / "load.png", title=f"Load of the experts: {title}")
        if points := read_thinned_series(folder.layers):
            draw_load_maps(points, path=folder.path / "load_steps.png", title=f"Load over training: {title}")
            draw_layer_curves(points, path=folder.path / "layers.png", title=f"Layers over training: {title}")
        with contextlib.suppress(UsageError):
            draw_labels(
                read_label_tables(folder.labels), path=folder.path / "labels.png", title=f"Who takes what: {title}"
            )

    def draw_experiment_figures(self, experiment: Experiment, results: Path) -> None:
        """Write summary and report of the comparison, and draw the curves with the differences where there are any."""
        from moebench.analysis.compare.experiment import compare_experiment
        from moebench.analysis.compare.summary import build_summary
        from moebench.runs.experiment_summary import digest_results, write_summary

        digest = digest_results(results, read_record(results / "experiments" / f"{experiment.name}.json")["cells"])
        try:
            comparison = compare_experiment(experiment, results)
        except UsageError:
            comparison = None  # unmatched or without a baseline: the curves alone
        if comparison is not None:
            write_summary(results, experiment.name, replace(build_summary(comparison), results_digest=digest))
            self._write_report(experiment, results)
        self._draw_curves(experiment, results, comparison)

    def _draw_curves(self, experiment: Experiment, results: Path, comparison: "Comparison | None") -> None:
        from moebench.analysis.compare.experiment import draw_experiment

        draw_experiment(experiment, results, results / "experiments" / experiment.name / "curves.png", comparison)

    def _write_report(self, experiment: Experiment, results: Path) -> None:
        """Write the report of an experiment; that of runs before it is part of it, or nothing."""
        from moebench.analysis.html_report.build import Source, build_page
        from moebench.runs.experiment_summary import REPORT_FILE
        from moebench.runs.folder import write_atomically

        if not experiment.is_reported:
            return
        made_at = time.strftime("%Y-%m-%d %H:%M")
        page = build_page(Source(experiment=experiment, results=results, command=self.command, made_at=made_at))
        file = results / "experiments" / experiment.name / REPORT_FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, page.html)
