"""What a tracker is sent: run folders, and the experiments that they belong to."""

import contextlib
import uuid
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from moebench.errors import UsageError
from moebench.file_access import read_plain_file, require_plain_name
from moebench.runs.experiment_record import read_records
from moebench.runs.folder import RunFolder, list_run_folders, write_atomically
from moebench.runs.journal import Point, read_journal
from moebench.runs.result import RunResult

_ID_FILE = "tracking_id"


@dataclass(frozen=True)
class RunSource:
    """One run folder; its files are read once."""

    folder: RunFolder

    @classmethod
    def of(cls, results: Path, cell_id: str) -> "RunSource":
        """Return the source of a cell's run."""
        return cls(RunFolder.of(results, cell_id))

    @property
    def id(self) -> str:
        """The cell's id."""
        return self.folder.path.name

    @cached_property
    def cell(self) -> dict[str, Any]:
        """Description of the cell; raises UsageError when the file is missing or damaged."""
        return self.folder.read_cell()

    @cached_property
    def result(self) -> RunResult | None:
        """Result of the run, None until it has ended."""
        return self.folder.read_result()

    @property
    def has_started(self) -> bool:
        """Whether the run has written anything."""
        return self.folder.journal.exists() or self.folder.result.exists()

    def read_final_points(self, offset: int = 0) -> list[Point]:
        """Return the points from byte `offset` of the journal on that no resumed run can repeat.

        Those are all points of a run that has ended; of another one, those up to its last checkpoint.
        """
        points, _ = read_journal(self.folder.journal, offset)
        if self.result is not None:
            return points
        last_step = self.folder.checkpointed_step
        return [point for point in points if point.step <= last_step]

    @property
    def attachments(self) -> list[Path]:
        """Files that are sent as they are, including figures."""
        files = [self.folder.environment, self.folder.result, self.folder.labels, self.folder.log]
        # Not links: whoever made the folder could have other files of ours sent.
        is_in_folder = not self.folder.path.is_symlink()
        files += sorted(self.folder.path.glob("*.png"))
        return [path for path in files if path.is_file() and not path.is_symlink() and is_in_folder]

    @cached_property
    def digest(self) -> str:
        """Checksum of the result and its files, which are sent again when it changes."""
        return digest_files(
            [path for path in [*self.attachments, self.folder.loads, self.folder.layers] if path.is_file()]
        )


def digest_files(files: Iterable[Path], text: str = "") -> str:
    """Return the checksum of names and contents of files and of a text; raise UsageError for one that is unreadable."""
    try:
        checksum = zlib.crc32(text.encode())
        for path in files:
            checksum = zlib.crc32(path.name.encode() + read_plain_file(path, None), checksum)
    except OSError as error:
        raise UsageError(f"{error.filename}: cannot be read ({error.strerror})") from error
    return f"{checksum:08x}"


def results_id(results: Path) -> str:
    """Return what identifies a results folder in a tracker that several folders send to; make it if there is none."""
    if read_results_id(results) is None:
        write_atomically(results / _ID_FILE, f"{uuid.uuid4().hex}\n")
    return read_results_id(results) or ""


def read_results_id(results: Path) -> str | None:
    """Return what identifies a results folder in a tracker, None if it has sent nothing yet."""
    try:
        return read_plain_file(results / _ID_FILE).decode(errors="replace").strip()[:100] or None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"{results / _ID_FILE}: cannot be read ({error.strerror})") from error


def list_recorded_experiments(results: Path) -> dict[str, dict[str, Any]]:
    """Return the experiments of a results folder by name, with a list `cells` of mappings with id, arm and seed.

    Runs whose experiment has no record are listed under the experiment's name in their cell file.
    """
    if not results.is_dir():
        raise UsageError(f"results folder {results} does not exist (--results, MOEBENCH_RESULTS)")
    recorded, _ = read_records(results)
    listed_ids = {cell["id"] for record in recorded.values() for cell in record["cells"]}
    unrecorded: dict[str, dict[str, Any]] = {}
    for folder in list_run_folders(results):
        if folder.path.name not in listed_ids:
            with contextlib.suppress(UsageError):  # `list_unreadable` names it
                name = require_plain_name(folder.read_cell()["experiment"], f"{folder.path}: experiment")
                unrecorded.setdefault(name, {"name": name, "cells": []})["cells"].append({"id": folder.path.name})
    for name in unrecorded.keys() & recorded.keys():
        # Cells of an earlier version of the experiment.
        recorded[name]["cells"] = [*recorded[name]["cells"], *unrecorded[name]["cells"]]
    return {**unrecorded, **recorded}


def list_unreadable(results: Path) -> list[str]:
    """Return a line for each record of an experiment and each `cell.json` that is damaged, and so left out."""
    recorded, problems = read_records(results)
    listed_ids = {cell["id"] for record in recorded.values() for cell in record["cells"]}
    for folder in list_run_folders(results):
        try:
            if folder.path.name not in listed_ids:
                folder.read_cell()
        except UsageError as error:
            problems.append(str(error))
    return problems
