"""How far the journal of a run was sent to a tracker."""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

from moebench.errors import UsageError
from moebench.runs.folder import read_json, write_json
from moebench.tracking.address import redact_uri, sqlite_path
from moebench.tracking.mlflow_store import MlflowStore
from moebench.tracking.source import RunSource


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """How far a journal was sent."""

    offset: int = 0
    """Bytes sent."""
    step: int = -1
    """Step of the last point sent."""
    tail: int = 0
    """Checksum of the bytes before `offset`."""

    @classmethod
    def from_json(cls, text: str | None) -> "Cursor":
        """Return the cursor of a tag; that of a run that was not sent if the tag is missing or damaged."""
        try:
            return cls(**json.loads(text or "{}"))
        except (ValueError, TypeError):
            return cls()


def compute_tail_checksum(path: Path, offset: int) -> int:
    """Return the CRC-32 of the last bytes before `offset`, at most 4096; 0 for a missing file or offset 0."""
    if offset == 0 or not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, offset - 4096))
        return zlib.crc32(file.read(min(offset, 4096)))


def record_cursor(
    source: RunSource, store: MlflowStore, run_id: str, cursor: Cursor, *, is_finished: bool = False
) -> None:
    """Write what was sent to the run folder, where it can be read without contacting the tracker."""
    path, database = source.folder.path / "tracking.json", sqlite_path(store.uri)
    try:
        entries = read_json(path) if path.exists() else {}
    except UsageError:
        entries = {}
    # The database of a results folder moves with it.
    is_own = database is not None and database.parent.resolve() == path.parent.parent.parent.resolve()
    address = database.name if database and is_own else redact_uri(store.uri)
    progress = {"next_offset": cursor.offset, "last_step": cursor.step, "finished": is_finished}
    entries.setdefault(address, {})[store.experiment] = {"run_id": run_id, **progress}
    write_json(path, entries)
