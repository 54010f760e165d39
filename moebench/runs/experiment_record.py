"""The records of experiments in a results folder: question, baseline and cells, one file for each experiment."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from moebench.errors import UsageError
from moebench.runs.checked_json import Types, add_checksum, pop_checksum, read_json, require_types
from moebench.runs.folder import write_json
from moebench.schema import DEFAULT_MARGIN

SERVING_KEYS = ("tuning_of", "stage_of")
"""Keys of a record whose runs come before those of another experiment, which the value names."""
LOCK_TIMEOUT_S = 60.0
"""A record is locked for milliseconds; a process that was stopped while it held the lock is not waited for."""


def read_record(path: Path) -> dict[str, Any]:
    """Return the record of an experiment, with a list `cells` of mappings with an `id`; raise UsageError for damage."""
    record = read_json(path)
    try:
        record = pop_checksum(record)  # records of earlier versions have none
        optional: dict[str, Types] = {"tuning": dict, "margin": (int, float)}
        optional |= dict.fromkeys(SERVING_KEYS, str) | {"has_several_data": bool}
        optional |= {"seed_plans": dict, "seed_plan": str, "seed_plans_lost": bool}
        require_types(record, {"name": str, "cells": list, **optional}, optional=tuple(optional))
        if record["name"] != path.stem:
            raise ValueError(f"it is of the experiment '{record['name'][:40]}', under another name")
        if not 0 < record.get("margin", DEFAULT_MARGIN) < 1:
            raise ValueError(f"'margin' is {record['margin']}, expected a number between 0 and 1")
        for cell in record["cells"]:
            if not isinstance(cell, dict):
                raise ValueError(f"'cells' has {str(cell)[:40]!r}, expected an object")
            require_types(cell, {"id": str, "arm": str, "seed": int}, optional=("arm", "seed"))
            if Path(cell["id"]).name != cell["id"]:  # it becomes a part of a path
                raise ValueError(f"{cell['id'][:40]!r} is not the id of a run")
    except ValueError as error:
        raise UsageError(f"{path}: damaged ({error}); `moebench run` of the experiment writes it again") from error
    return record


def find_served_experiment(record: Mapping[str, Any]) -> str:
    """Return the experiment whose tuning runs, or earlier stage, a record has; empty for runs that are reported."""
    return next((str(record[key]) for key in SERVING_KEYS if record.get(key)), "")


@contextlib.contextmanager
def lock_records(folder: Path) -> Iterator[None]:
    """Keep others from writing the records in a folder between a reading and the writing that follows from it.

    Raises UsageError if the lock cannot be had.
    """
    try:
        lock = FileLock(folder / ".lock", timeout=LOCK_TIMEOUT_S)
        lock.acquire()
    except Timeout as error:
        raise UsageError(f"{folder}: another process has held the lock of the records for a minute") from error
    except OSError as error:
        raise UsageError(f"{folder}: its lock cannot be written ({error.strerror})") from error
    try:
        yield
    finally:
        lock.release()


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write the record of an experiment with its checksum, atomically; call it within `lock_records`."""
    write_json(path, add_checksum(record))


def read_records(results: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return the records by name, and a line for each that is damaged; raise UsageError if none can be listed."""
    folder = results / "experiments"
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix == ".json" and not path.name.startswith("."))
    except FileNotFoundError:
        return {}, []
    except OSError as error:
        raise UsageError(f"{folder}: cannot be read as the folder of experiments ({error.strerror})") from error
    records, problems = {}, []
    for path in paths:
        try:
            records[path.stem] = read_record(path)
        except UsageError as error:
            problems.append(str(error))
    return records, problems
