"""What a tracker is sent: run folders, and the experiments that they belong to."""

import uuid
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from moebench.errors import UsageError
from moebench.runs.folder import RunFolder, read_json, write_atomically
from moebench.runs.journal import Point, read_journal
from moebench.runs.result import RunResult


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
        return [path for path in files if path.exists()] + sorted(self.folder.path.glob("*.png"))

    @cached_property
    def digest(self) -> str:
        """Checksum of the result and its files, which are sent again when it changes."""
        files = [path for path in [*self.attachments, self.folder.loads] if path.exists()]
        return f"{zlib.crc32(b''.join(path.name.encode() + path.read_bytes() for path in files)):08x}"


def results_id(results: Path) -> str:
    """Return what identifies a results folder in a tracker that several folders send to; make it if there is none."""
    path = results / "tracking_id"
    if not path.exists():
        write_atomically(path, f"{uuid.uuid4().hex}\n")
    return path.read_text().strip()


def list_recorded_experiments(results: Path) -> dict[str, dict[str, Any]]:
    """Return the experiments of a results folder by name, with a list `cells` of mappings with id, arm and seed.

    Runs whose experiment has no record are listed under the experiment's name in their cell file.
    """
    if not results.is_dir():
        raise UsageError(f"results folder {results} does not exist (--results, MOEBENCH_RESULTS)")
    records = [read_json(path) for path in sorted((results / "experiments").glob("*.json"))]
    recorded = {str(record["name"]): record for record in records}
    listed_ids = {cell["id"] for record in records for cell in record["cells"]}
    unrecorded: dict[str, dict[str, Any]] = {}
    for path in sorted((results / "runs").glob("*/cell.json")):
        if path.parent.name not in listed_ids:
            name = str(read_json(path).get("experiment", "unnamed"))
            unrecorded.setdefault(name, {"name": name, "cells": []})["cells"].append({"id": path.parent.name})
    for name in unrecorded.keys() & recorded.keys():
        # Cells of an earlier version of the experiment.
        recorded[name]["cells"] = [*recorded[name]["cells"], *unrecorded[name]["cells"]]
    return {**unrecorded, **recorded}
