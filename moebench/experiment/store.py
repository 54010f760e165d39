"""Check the results folder before training, and record an experiment in it."""

import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moebench.errors import UsageError
from moebench.experiment.disk import EXTRA_CHECKPOINTS, count_checkpoint_bytes, count_kept_bytes
from moebench.experiment.grid import Experiment
from moebench.experiment.model_costs import ModelCosts
from moebench.experiment.plan import cell_state
from moebench.experiment.seed_plan import (
    CURRENT_KEY,
    LOST_KEY,
    Seeds,
    append_run,
    change_seed,
    list_added_cells,
    read_seed_plan,
)
from moebench.experiment.seed_plan import RECORD_KEY as PLANS_KEY
from moebench.experiment.tuning import has_diverged, read_tuning
from moebench.file_access import read_plain_file, require_no_links, require_utf8
from moebench.launch.scheduler import Outcome
from moebench.runs.cell import Cell
from moebench.runs.experiment_record import SERVING_KEYS, lock_records, read_record, write_record
from moebench.runs.trivial_baselines import RECORD_KEY
from moebench.tasks.task import TASKS

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
    largest = max(count_checkpoint_bytes(cell.config, costs) for cell in cells)
    kept = sum(count_kept_bytes(cell.config, costs) for cell in cells)
    needed = RESERVED_BYTES + largest * (len(cells) + EXTRA_CHECKPOINTS) + kept
    free = shutil.disk_usage(results).free
    if free < needed:
        raise UsageError(
            f"results folder {results}: {free / 2**20:.0f} MiB free, {needed / 2**20:.0f} MiB needed for checkpoints"
            f" of {len(cells)} cells; free some space or choose another folder with --results"
        )


def require_one_file(results: Path, experiment: Experiment) -> None:
    """Raise UsageError if the name of the experiment belongs to another file: both would share one record.

    A file that was moved, and a copy, are the same experiment.
    """
    try:
        record = read_record(results / "experiments" / f"{experiment.name}.json")
        earlier, file = Path(record.get("path") or record.get("file") or ""), Path(experiment.file)
        if not earlier.is_file() or not file.is_file() or earlier.samefile(file):
            return
        is_copy = read_plain_file(earlier) == read_plain_file(file)
    except (UsageError, OSError, TypeError, ValueError):  # no record, or none that can be compared with
        return
    if not is_copy:
        raise UsageError(
            f"{file}: results folder {results} has results of '{earlier}', another experiment with the name"
            f" '{experiment.name}'; rename one of the files, or choose another folder with --results"
        )


def record_experiment(results: Path, experiment: Experiment, added: Mapping[str, Seeds] | None = None) -> None:
    """Write the question of the experiment, the ids of its cells and what its arms have chosen in tuning.

    The history of its seeds is kept and continued. `added`: seeds that arms get beyond those of the file.
    """
    folder = results / "experiments"
    try:
        folder.mkdir(exist_ok=True)
        with lock_records(folder):
            path = folder / f"{experiment.name}.json"
            write_record(path, _build_record(path, results, experiment, added or {}))
    except OSError as error:
        raise UsageError(f"{folder / experiment.name}.json: cannot be written ({error.strerror})") from error


def _build_record(path: Path, results: Path, experiment: Experiment, added: Mapping[str, Seeds]) -> dict[str, Any]:
    """Return the record of an experiment, with the history in the one that is there."""
    earlier: dict[str, Any] = {}
    try:
        earlier = read_record(path) if os.path.lexists(path) else {}
    except UsageError:
        earlier = {LOST_KEY: True}
    plans = _continue_plans(results, experiment, earlier, added)
    cells = experiment.cells
    if experiment.design is not None:
        plan = read_seed_plan({"name": experiment.name, PLANS_KEY: plans}, experiment.design.key)
        cells = (*cells, *list_added_cells(cells, plan.added))
    record: dict[str, Any] = {
        "name": experiment.name,
        "question": experiment.question,
        "file": experiment.file,
        "path": str(Path(experiment.file).absolute()),
        "baseline": experiment.baseline,
        "margin": experiment.margin,
        "metric": TASKS.get(experiment.cells[0].config.task.name).facts.metric,
        "cells": [{"id": cell.id, "arm": cell.arm, "seed": cell.seed} for cell in cells],
        "time": time.time(),
    }
    state = read_tuning(experiment, results)
    if state is not None:
        record["tuning"] = state.to_dict()
    record |= {"has_several_data": True} if experiment.has_several_data else {}
    record |= {key: value for key in SERVING_KEYS if (value := getattr(experiment, key))}
    require_one_file(results, experiment)
    record |= {key: value for key, value in earlier.items() if key == RECORD_KEY}
    record |= {PLANS_KEY: plans} if plans else {}
    record |= {LOST_KEY: True} if earlier.get(LOST_KEY) else {}
    return record | ({CURRENT_KEY: experiment.design.key} if experiment.design else {})


def _continue_plans(
    results: Path, experiment: Experiment, record: Mapping[str, Any], added: Mapping[str, Seeds]
) -> dict[str, Any]:
    """Return the plans of a record, with this run in the history of its own."""
    plans: dict[str, Any] = dict(record.get(PLANS_KEY, {}))
    design = experiment.design
    if design is None:
        return plans
    plan = read_seed_plan(record, design.key)
    baseline = next((cell for cell in experiment.cells if cell.arm == experiment.baseline), None)
    seeds = {seed for entry in plan.entries for seed in entry.seeds}
    num_finished = sum(_may_be_done(results, change_seed(baseline, seed)) for seed in seeds) if baseline else 0
    plan = append_run(plan, design, num_finished=num_finished, time=time.time())
    plan = replace(plan, added={**plan.added, **added})
    return {**plans, design.key: plan.to_dict()}


def _may_be_done(results: Path, cell: Cell) -> bool:
    try:
        return cell_state(results, cell) == "done"
    except UsageError:  # damaged
        return True


def split_unfinished(results: Path, experiment: Experiment) -> tuple[list[Cell], list[Outcome]]:
    """Return the cells that are not done, in order and without duplicates, and a failure for each damaged one.

    A cell whose files cannot be read is not trained, because it may have a result; it does not keep others from it. A
    tuning run that diverged is done: its outcome is part of the choice, and would be the same again.
    """
    unfinished, damaged = [], []
    for cell in {cell.id: cell for cell in experiment.cells}.values():
        try:
            is_decided = bool(experiment.tuning_of) and has_diverged(results, cell.id)
            if cell_state(results, cell) != "done" and not is_decided:
                unfinished.append(cell)
        except UsageError as error:
            damaged.append(Outcome(cell=cell, status="failed", error=str(error)))
    return unfinished, damaged
