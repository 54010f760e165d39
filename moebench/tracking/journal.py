"""The local record: a journal with a line for every point a run measures, and the folder it is in."""

import errno
import json
import math
import os
import posixpath
import re
import time as clock
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

from moebench.errors import UsageError

_NAME = re.compile(r"[A-Za-z0-9_\-.:/ ]{1,250}")


@dataclass(frozen=True, kw_only=True)
class Point:
    """The metrics of one step at one time (unix seconds); ``end`` is the byte behind its line."""

    step: int
    time: float
    metrics: Mapping[str, float]
    end: int


@lru_cache(maxsize=4096)
def valid_name(name: str) -> bool:
    """Say whether a tracker accepts this metric name: one bad name would make it refuse a whole batch."""
    # Names are also paths in some stores: 'a//b' and '../a' are refused there.
    escapes = name.startswith(("/", "..")) or name == "."
    return bool(_NAME.fullmatch(name)) and posixpath.normpath(name) == name and not escapes


class Journal:
    """An append-only file of points that survives a crash at any byte.

    Opening it drops a torn last line. Each append is one write to the operating system, so a killed process
    loses nothing that was appended; ``flush`` also guards against a power loss.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(path)
        self._file = path.open("ab", buffering=0)

    def append(self, step: int, metrics: Mapping[str, float], time: float | None = None) -> None:
        """Add one point, measured now unless ``time`` (unix seconds) is given.

        Raises ValueError for a metric name that no tracker would accept and OSError for a full disk.
        """
        for name in metrics:
            if not valid_name(name):
                raise ValueError(f"metric name {name!r}: allowed are letters, digits and _ - . : / space")
        values = {name: _to_json(float(value)) for name, value in metrics.items()}
        point = {"step": int(step), "time": clock.time() if time is None else float(time), "metrics": values}
        line = json.dumps(point, allow_nan=False).encode() + b"\n"
        if self._file.write(line) != len(line):
            raise OSError(errno.ENOSPC, "the disk is full", str(self.path))

    def flush(self) -> None:
        """Return when every point is on the disk itself."""
        os.fsync(self._file.fileno())

    def truncate_after(self, step: int) -> None:
        """Drop the points beyond a checkpointed step, so that a resumed run never has a step twice."""
        lines = self.path.read_bytes().splitlines(keepends=True)
        points, _ = read_journal(self.path)
        kept = b"".join(line for line, point in zip(lines, points, strict=False) if point.step <= step)
        self._file.close()
        fresh = self.path.with_name(self.path.name + ".tmp")
        with fresh.open("wb") as file:
            file.write(kept)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self.path)
        self._file = self.path.open("ab", buffering=0)

    def close(self) -> None:
        """Put everything on the disk and close the file."""
        if not self._file.closed:
            self.flush()
            self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_journal(path: Path, offset: int = 0) -> tuple[list[Point], int]:
    """Return the points from byte ``offset`` on, and the offset to continue from.

    A last line without its end is a crash or a write in progress: it is left for the next call. A missing
    file is an empty journal. Raises UsageError naming file and line for any other damage.
    """
    if not path.exists():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        content = file.read()
    points = list(_points(path, content, offset))
    return points, points[-1].end if points else offset


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run and what its files say."""

    path: Path

    @cached_property
    def cell(self) -> dict[str, Any]:
        """What was to be run; raises UsageError when the file is missing or damaged."""
        return read_json(self.path / "cell.json")

    @cached_property
    def result(self) -> dict[str, Any] | None:
        """How the run ended, or None while it has not."""
        path = self.path / "result.json"
        return read_json(path) if path.exists() else None

    @property
    def started(self) -> bool:
        """Whether anything has happened yet."""
        return self.journal.exists() or (self.path / "result.json").exists()

    @property
    def journal(self) -> Path:
        """The file of points."""
        return self.path / "journal.jsonl"

    @property
    def checkpointed(self) -> int:
        """The last step with a checkpoint, -1 without one: a resumed run repeats only what comes after."""
        names = [re.match(r"step_(\d+)", path.name) for path in self.path.glob("checkpoints/step_*.json")]
        return max((int(name[1]) for name in names if name), default=-1)

    @property
    def attachments(self) -> list[Path]:
        """The files that are sent as they are, figures included."""
        files = [self.path / name for name in ("environment.json", "result.json", "log.txt")]
        return [path for path in files if path.exists()] + sorted(self.path.glob("*.png"))

    @cached_property
    def digest(self) -> str:
        """A checksum of the result and its files: they are sent once, and again when they change."""
        files = [path for path in [*self.attachments, self.path / "load.jsonl"] if path.exists()]
        return f"{zlib.crc32(b''.join(path.name.encode() + path.read_bytes() for path in files)):08x}"


def recorded_experiments(results: Path) -> dict[str, dict[str, Any]]:
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


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises UsageError naming the file when it is missing or damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: holds a {type(content).__name__}, expected an object")
    return content


def _points(path: Path, content: bytes, offset: int) -> Iterator[Point]:
    end = offset
    for line in content.splitlines(keepends=True):
        if not line.endswith(b"\n"):
            return
        end += len(line)
        try:
            yield _parse(line, end)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            number = path.read_bytes()[:end].count(b"\n")
            raise UsageError(
                f"{path}, line {number}: not a point of a journal ({error}). Remove the line to go on."
            ) from error


def _parse(line: bytes, end: int) -> Point:
    raw = json.loads(line)
    metrics = {name: float(value) for name, value in raw["metrics"].items()}
    bad = [name for name in metrics if not valid_name(name)]
    if bad:
        raise ValueError(f"metric name {bad[0]!r}")
    return Point(step=int(raw["step"]), time=float(raw["time"]), metrics=metrics, end=end)


def _to_json(value: float) -> float | str:
    # JSON has no NaN or infinity; float() reads these words back.
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _drop_torn_line(path: Path) -> None:
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole != len(content):
        os.truncate(path, whole)
