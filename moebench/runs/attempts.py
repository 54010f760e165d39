"""The attempts at a cell: one line for each time that a runner started it, in `attempts.jsonl`."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from moebench.file_access import open_to_write, parse_json, read_plain_file


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of a cell, and how it ended."""

    started_at: float
    """Unix seconds."""
    seconds: float
    status: str
    """done, failed, stopped, skipped or busy."""
    error: str | None
    fault: str
    """A `Fault` if it failed."""
    step: int
    """The last step that it is known to have completed."""


def record_attempt(file: Path, attempt: Attempt) -> None:
    """Append an attempt."""
    with os.fdopen(open_to_write(file), "a", encoding="utf-8") as lines:
        lines.write(json.dumps(asdict(attempt)) + "\n")


def read_attempts(file: Path) -> list[Attempt]:
    """Return the attempts at a cell, the oldest first; lines that are damaged are left out."""
    try:
        lines = read_plain_file(file).splitlines()
    except OSError:
        return []
    attempts = []
    for line in lines:
        try:
            attempts.append(Attempt(**parse_json(line)))
        except (ValueError, TypeError):
            continue
    return attempts
