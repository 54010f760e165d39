"""`moebench verify`: check every file of a results folder, and repair what is safe to repair."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from moebench.commands import format_command
from moebench.errors import UsageError
from moebench.experiment.seed_plan import LOST_KEY
from moebench.parallel.checkpoint import find_damage, find_refused_content
from moebench.parallel.manifest import Manifest, list_manifests
from moebench.runs.checked_json import CHECKSUM, read_json
from moebench.runs.experiment_record import lock_records, read_record, write_record
from moebench.runs.folder import RunFolder, list_run_folders
from moebench.runs.journal import read_journal
from moebench.runs.layer_series import iter_layer_series
from moebench.runs.recorder import find_missing, read_loads
from moebench.tasks.cache import read_entry
from moebench.training.kept_weights import list_kept_weights
from moebench.training.label_tables import read_label_tables


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something in a results folder or on the machine that is not as it should be."""

    where: str
    problem: str
    remedy: str
    """What to do; for a finding that `--fix` repairs, what it does."""
    is_note: bool = False
    """Whether it is for information and leaves the store clean."""
    fix: Callable[[], None] | None = field(default=None, repr=False)
    """Repairs it without losing anything; None: it is left to the user."""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        level = "note" if self.is_note else "problem"
        return {
            "where": self.where,
            "level": level,
            "problem": self.problem,
            "remedy": self.remedy,
            "fixable": self.fix is not None,
        }


def check_store(results: Path) -> Iterator[Finding]:
    """Yield the findings in runs, records of experiments and cache; raise UsageError for a folder that is none."""
    if not results.is_dir():
        raise UsageError(f"results folder {results} does not exist (--results, MOEBENCH_RESULTS)")
    for name in ("runs", "experiments", "cache"):
        folder = results / name
        if folder.exists() and not folder.is_dir():
            yield Finding(where=str(folder), problem="is a file, not a folder", remedy="move it away")
            return
    for path in sorted((results / "runs").glob("*")) if (results / "runs").exists() else ():
        if not path.name.startswith(".") and not (path / "cell.json").exists():
            yield Finding(where=str(path), problem="is not a run: it has no cell.json", remedy="move it away")
    for run in list_run_folders(results):
        yield from _check_run(run)
    yield from _check_records(results)
    for path in sorted((results / "cache").glob("*/meta.json")):
        if read_entry(path.parent) is None:
            yield _removable(path.parent, "is a damaged entry of the cache", "removed; the next run prepares it again")
    for path in sorted(results.glob(".removed-*")):
        yield _removable(path, "is left of a removal that was interrupted", "removed")


def _check_run(folder: RunFolder) -> Iterator[Finding]:
    try:
        with FileLock(folder.lock, timeout=0) if folder.lock.exists() else contextlib.nullcontext():
            yield from _check_idle_run(folder)
    except Timeout:
        yield Finding(
            where=str(folder.path), problem="is being trained", remedy="check it again when it is done", is_note=True
        )
    except OSError as error:
        yield Finding(
            where=str(error.filename or folder.path),
            problem=f"cannot be read or locked ({error.strerror})",
            remedy="correct its permissions",
        )


def _check_idle_run(folder: RunFolder) -> Iterator[Finding]:
    rm = format_command("rm", folder.path.name, results=folder.path.parents[1])
    remedy = f"restore it, or `{rm}` and train it again"
    result = None
    try:
        folder.read_cell()
        if CHECKSUM not in read_json(folder.cell):
            yield _unchecked(folder.cell)
    except UsageError as error:
        yield _damaged(folder.cell, error, "`moebench run` of its experiment writes it")
    try:
        result = folder.read_result()
        if result and CHECKSUM not in read_json(folder.result):
            yield _unchecked(folder.result)
    except UsageError as error:
        yield _damaged(folder.result, error, "delete it; `moebench run` trains the cell")
    for path in folder.records:
        try:
            folder.require_unchanged(path) if result else None
            _read_record(folder, path)
        except (UsageError, OSError) as error:
            yield _damaged(path, error, remedy)
    for name in sorted({*(result.records if result else {})} - {path.name for path in folder.records}):
        yield Finding(where=str(folder.path / name), problem="is missing", remedy=remedy)
    if result and result.status == "done" and not list_manifests(folder.checkpoints):
        problem = "has no checkpoint: `curve` and `load_model` cannot use the run"
        yield Finding(where=str(folder.path), problem=problem, remedy=remedy, is_note=True)
    yield from _check_checkpoints(folder)
    unfinished = (*folder.checkpoints.glob(".step_*"), *folder.kept_weights.glob(".step_*"))
    for path in (*folder.path.glob(".*.json.*"), *folder.path.glob("*.tmp"), *unfinished):
        yield _removable(path, "is left of a process that was killed while it wrote", "removed")


def _read_record(folder: RunFolder, path: Path) -> None:
    """Raise UsageError if one of a run's records cannot be read."""
    if path == folder.journal:
        points, _ = read_journal(path)
        steps = [point.step for point in points]
        if steps != sorted(steps):
            raise UsageError(f"{path}: its steps are not in order")
    elif path == folder.layers:
        series = [point.step for point in iter_layer_series(path)]
        if series != sorted({*series}):
            raise UsageError(f"{path}: its steps are not in order")
    elif path == folder.labels:
        read_label_tables(path)
    elif path == folder.init:
        folder.read_init()
    else:
        read_loads(path)


def _check_checkpoints(folder: RunFolder) -> Iterator[Finding]:
    cell_id = folder.path.name

    def check(manifest: Manifest) -> str | None:
        if manifest.cell not in (None, cell_id):
            return f"it is of the cell {manifest.cell}"
        return find_missing(folder, manifest.records)

    if folder.checkpoints.exists() and not folder.checkpoints.is_dir():
        yield Finding(where=str(folder.checkpoints), problem="is a file, not a folder", remedy="delete it")
    for path in list_manifests(folder.checkpoints):
        damage = find_damage(path, check)
        if damage:
            remedy = "the next run of its experiment uses an earlier one, or starts the cell again"
            yield Finding(where=str(path.with_suffix(".ckpt")), problem=f"is damaged: {damage}", remedy=remedy)
        elif refused := find_refused_content(path.with_suffix(".ckpt")):
            yield _refused(path.with_suffix(".ckpt"), refused)
        elif Manifest.read(path).cell is None:
            yield _unchecked(path)
    kept, damaged = list_kept_weights(folder)
    for path, damage in damaged.items():
        remedy = "delete it; `probe --show history` leaves it out"
        yield Finding(where=str(path), problem=f"is damaged: {damage}", remedy=remedy)
    for path in kept.values():
        if refused := find_refused_content(path, has_weights_alone=True):
            yield _refused(path, refused)


def _check_records(results: Path) -> Iterator[Finding]:
    cells: dict[str, list[dict[str, Any]]] = {}
    for folder in list_run_folders(results):
        with contextlib.suppress(UsageError):
            cell = folder.read_cell()
            entry = {key: cell[key] for key in ("id", "arm", "seed")}
            cells.setdefault(cell["experiment"], []).append(entry)
    paths = {path.stem: path for path in (results / "experiments").glob("*.json")}
    for name in sorted({*paths, *cells}):
        path = results / "experiments" / f"{name}.json"
        record: dict[str, Any] = {"name": name, "question": "", "cells": cells.get(name, []), "baseline": ""}
        try:
            if name in paths:
                read_record(path)
                if CHECKSUM not in read_json(path):
                    yield _unchecked(path)
                continue
            problem = f"is missing; {len(cells[name])} runs are of this experiment"
        except UsageError as error:
            problem = _describe(path, error)
            record[LOST_KEY] = True
        can_write = bool(cells.get(name)) and not path.is_dir() and Path(name).name == name
        remedy = "written again from its runs, without its question" if can_write else "delete it"
        yield Finding(
            where=str(path),
            problem=problem,
            remedy=remedy,
            fix=(lambda path=path, record=record: _write_record(path, record)) if can_write else None,  # type: ignore[misc]
        )


def _describe(path: Path, error: Exception) -> str:
    """Return what an error says about a file without the path before it, which a finding names itself."""
    return str(error).removeprefix(str(path)).lstrip(":, ")


def _write_record(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    with lock_records(path.parent):
        write_record(path, record)


def _damaged(path: Path, error: Exception, remedy: str) -> Finding:
    return Finding(where=str(path), problem=_describe(path, error), remedy=remedy)


def _refused(checkpoint: Path, problem: str) -> Finding:
    remedy = "delete it, and ask where it comes from: its checksums are correct, so someone wrote it on purpose"
    return Finding(where=str(checkpoint), problem=problem, remedy=remedy)


def _unchecked(path: Path) -> Finding:
    return Finding(
        where=str(path), problem="no checksum recorded", remedy="nothing: an earlier version wrote it", is_note=True
    )


def _removable(path: Path, problem: str, remedy: str) -> Finding:
    def remove() -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    return Finding(where=str(path), problem=problem, remedy=remedy, fix=remove)
