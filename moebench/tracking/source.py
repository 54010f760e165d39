"""What there is to send: run folders seen through a tracker's eyes, and the experiments they belong to."""

import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from moebench.errors import UsageError
from moebench.runs.folder import RunFolder, read_json
from moebench.runs.result import RunResult


@dataclass(frozen=True)
class RunSource:
    """One run folder, read once."""

    folder: RunFolder

    @classmethod
    def of(cls, results: Path, cell_id: str) -> "RunSource":
        """Return the source of a cell."""
        return cls(RunFolder.of(results, cell_id))

    @property
    def id(self) -> str:
        """The cell's id."""
        return self.folder.path.name

    @cached_property
    def cell(self) -> dict[str, Any]:
        """What was to be run; raises UsageError when the file is missing or damaged."""
        return self.folder.read_cell()

    @cached_property
    def result(self) -> RunResult | None:
        """How the run ended, or None while it has not."""
        return self.folder.read_result()

    @property
    def started(self) -> bool:
        """Whether anything has happened yet."""
        return self.folder.journal.exists() or self.folder.result.exists()

    @property
    def attachments(self) -> list[Path]:
        """The files that are sent as they are, figures included."""
        files = [self.folder.environment, self.folder.result, self.folder.labels, self.folder.log]
        return [path for path in files if path.exists()] + sorted(self.folder.path.glob("*.png"))

    @cached_property
    def digest(self) -> str:
        """A checksum of the result and its files: they are sent once, and again when they change."""
        files = [path for path in [*self.attachments, self.folder.loads] if path.exists()]
        return f"{zlib.crc32(b''.join(path.name.encode() + path.read_bytes() for path in files)):08x}"


def list_recorded_experiments(results: Path) -> dict[str, dict[str, Any]]:
    """Return every experiment of a results folder with its cells (``{"id", "arm", "seed"}``), by name.

    Runs whose experiment has no record of its own are gathered under the name in their cell file.
    """
    if not results.is_dir():
        raise UsageError(f"results folder {results} does not exist (--results, MOEBENCH_RESULTS)")
    records = [read_json(path) for path in sorted((results / "experiments").glob("*.json"))]
    named = {str(record["name"]): record for record in records}
    listed = {cell["id"] for record in records for cell in record["cells"]}
    found: dict[str, dict[str, Any]] = {}
    for path in sorted((results / "runs").glob("*/cell.json")):
        if path.parent.name not in listed:
            name = str(read_json(path).get("experiment", "unnamed"))
            found.setdefault(name, {"name": name, "cells": []})["cells"].append({"id": path.parent.name})
    for name in found.keys() & named.keys():
        # A cell of an earlier version of the experiment still belongs to it.
        named[name]["cells"] = [*named[name]["cells"], *found[name]["cells"]]
    return {**found, **named}
