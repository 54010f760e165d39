"""Check the results folder before training, and record an experiment in it."""

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from moebench.errors import UsageError
from moebench.experiment.grid import Experiment
from moebench.experiment.model_costs import ModelCosts
from moebench.experiment.plan import cell_state
from moebench.file_access import require_no_links, require_utf8
from moebench.launch.scheduler import Outcome
from moebench.runs.cell import Cell
from moebench.runs.folder import write_json

CHECKPOINT_BYTES_PER_PARAM = 12
"""fp32 weight and two moments of AdamW."""
RESERVED_BYTES = 64 * 2**20
"""For journals, logs and the tracker's database."""

DAMAGED = "damaged"
"""State, in reports, of a cell whose result cannot be read."""


def open_results(results: Path) -> None:
    """Create the results folder if needed.

    Raises UsageError if it cannot be written, has links in it or a file in place of a folder.
    """
    require_utf8(results, "results folder")
    try:
        for folder in (results / "runs", results / "experiments", results / "cache"):
            if folder.exists() and not folder.is_dir():
                raise UsageError(f"results folder {results}: {folder.name} is a file, allowed: a folder; move it away")
        results.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=results):
            pass
    except OSError as error:
        raise UsageError(
            f"results folder {results}: cannot be written ({error.strerror}); choose another with --results"
        ) from error
    require_no_links(results)
    require_no_links(results / "runs")
    require_no_links(results / "experiments")


def require_disk_space(results: Path, cells: list[Cell], costs: ModelCosts) -> None:
    """Raise UsageError if the disk cannot hold the checkpoints of the cells to train."""
    if not cells:
        return
    largest = max(costs.facts(cell.config).cost.total_params for cell in cells)
    # A finished cell keeps one checkpoint; one that trains keeps two and writes a third before it drops the oldest.
    needed = RESERVED_BYTES + CHECKPOINT_BYTES_PER_PARAM * largest * (len(cells) + 2)
    free = shutil.disk_usage(results).free
    if free < needed:
        raise UsageError(
            f"results folder {results}: {free / 2**20:.0f} MiB free, {needed / 2**20:.0f} MiB needed for checkpoints"
            f" of {len(cells)} cells; free some space or choose another folder with --results"
        )


def record_experiment(results: Path, experiment: Experiment) -> None:
    """Write the question of the experiment and the ids of its cells."""
    record: dict[str, Any] = {
        "name": experiment.name,
        "question": experiment.question,
        "file": experiment.file,
        "baseline": experiment.baseline,
        "cells": [{"id": cell.id, "arm": cell.arm, "seed": cell.seed} for cell in experiment.cells],
        "time": time.time(),
    }
    folder = results / "experiments"
    try:
        folder.mkdir(exist_ok=True)
        write_json(folder / f"{experiment.name}.json", record)
    except OSError as error:
        raise UsageError(f"{folder / experiment.name}.json: cannot be written ({error.strerror})") from error


def split_unfinished(results: Path, experiment: Experiment) -> tuple[list[Cell], list[Outcome]]:
    """Return the cells that are not done, in order and without duplicates, and a failure for each damaged one.

    A cell whose files cannot be read is not trained, because it may have a result; it does not keep others from it.
    """
    unfinished, damaged = [], []
    for cell in {cell.id: cell for cell in experiment.cells}.values():
        try:
            if cell_state(results, cell) != "done":
                unfinished.append(cell)
        except UsageError as error:
            damaged.append(Outcome(cell=cell, status="failed", error=str(error)))
    return unfinished, damaged
