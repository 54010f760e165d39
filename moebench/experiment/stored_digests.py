"""The digests of data that are gone, from the runs that were trained on them."""

import contextlib
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from moebench.config import to_plain
from moebench.errors import UsageError
from moebench.experiment.arms import read_data_digest
from moebench.runs.folder import list_run_folders
from moebench.schema import CellConfig


class StoredDigests:
    """Finds the digest of a cell's data in a results folder where the data themselves cannot be read."""

    def __init__(self, results: Path) -> None:
        self.results = results

    def find(self, config: CellConfig) -> str:
        """Return the digest of the data, or of those of the newest run with the same task; else raise UsageError."""
        try:
            return read_data_digest(config)
        except UsageError:
            task = json.loads(json.dumps(to_plain(config.task)))
            digests = [digest for stored, digest in self._tasks if stored == task]
            if not digests:
                raise
            return digests[-1]

    @cached_property
    def _tasks(self) -> list[tuple[Any, str]]:
        """Configuration of the task and digest of its data for each run, the newest last."""
        tasks = []
        for folder in sorted(list_run_folders(self.results), key=lambda folder: folder.cell.stat().st_mtime_ns):
            with contextlib.suppress(UsageError):  # damaged: `moebench verify` reports it
                cell = folder.read_cell()
                tasks.append((cell["config"].get("task"), str(cell["data"]["digest"])))
        return tasks


def choose_digest(results: Path | None) -> Callable[[CellConfig], str]:
    """Return a function from a cell to the digest of its data, which reads `results` where the data are missing."""
    return read_data_digest if results is None else StoredDigests(results).find
