"""Check the results folder before training, and record an experiment in it."""

import shutil
import time
from pathlib import Path
from typing import Any

from moebench.errors import UsageError
from moebench.experiment.grid import Experiment
from moebench.experiment.model_costs import ModelCosts
from moebench.experiment.plan import cell_state
from moebench.runs.cell import Cell
from moebench.runs.folder import write_json

CHECKPOINT_BYTES_PER_PARAM = 12
"""fp32 weight and two moments of AdamW."""
RESERVED_BYTES = 64 * 2**20
"""For journals, logs and the tracker's database."""


def open_results(results: Path) -> None:
    """Create the results folder if needed; raise UsageError if it cannot be written."""
    probe = results / ".writable"
    try:
        results.mkdir(parents=True, exist_ok=True)
        probe.write_text("x")
        probe.unlink()
    except OSError as error:
        raise UsageError(
            f"results folder {results}: cannot be written ({error.strerror}); choose another with --results"
        ) from error


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
    write_json(results / "experiments" / f"{experiment.name}.json", record)


def select_unfinished(results: Path, experiment: Experiment) -> list[Cell]:
    """Return the cells that are not done, in order, without duplicates."""
    cells = {cell.id: cell for cell in experiment.cells}
    return [cell for cell in cells.values() if cell_state(results, cell) != "done"]
