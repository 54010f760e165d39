"""The journal of a run: a file with one line for every point that the run records."""

import contextlib
import errno
import hashlib
import json
import math
import os
import posixpath
import re
import time as clock
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Self

from moebench.commands import format_command
from moebench.errors import UsageError
from moebench.file_access import open_to_write, read_plain_file

_NAME = re.compile(r"[A-Za-z0-9_\-.:/ ]{1,250}")


@dataclass(frozen=True, kw_only=True)
class Point:
    """The metrics of one step."""

    step: int
    time: float
    """When it was measured, in unix seconds."""
    metrics: Mapping[str, float]
    end: int
    """Offset of the byte after its line."""


@lru_cache(maxsize=4096)
def is_valid_metric_name(name: str) -> bool:
    """Return whether a tracker accepts this metric name: one bad name would make it refuse a whole batch."""
    # Names are also paths in some stores: 'a//b' and '../a' are refused there.
    escapes = name.startswith(("/", "..")) or name == "."
    return bool(_NAME.fullmatch(name)) and posixpath.normpath(name) == name and not escapes


@lru_cache(maxsize=256)
def _are_valid_names(names: tuple[str, ...]) -> bool:
    """Return whether a tracker accepts all names: the lines of a journal have few different sets of them."""
    return all(map(is_valid_metric_name, names))


class Journal:
    """An append-only file of points that survives a crash at any byte.

    Opening it drops a torn last line. Each append is one write to the operating system, so a killed process loses no
    point that was appended; `flush` also guards against a power loss. Appending to a file that was deleted or moved
    would lose points in silence, so both raise UsageError then.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._open()

    def _open(self) -> None:
        self._file = os.fdopen(open_to_write(self.path), "ab", buffering=0)  # first: it follows no link
        _drop_torn_line(self.path)
        content = read_plain_file(self.path, None)
        self._digest, self._num_bytes = hashlib.sha256(content), len(content)

    def append(self, step: int, metrics: Mapping[str, float], time: float | None = None) -> None:
        """Add one point, measured now unless `time` (unix seconds) is given.

        Raises ValueError for a metric name that no tracker would accept and OSError for a full disk.
        """
        for name in metrics:
            if not is_valid_metric_name(name):
                raise ValueError(f"metric name {name!r}: allowed are letters, digits and _ - . : / space")
        values = {name: _to_json(float(value)) for name, value in metrics.items()}
        point = {"step": int(step), "time": clock.time() if time is None else float(time), "metrics": values}
        line = json.dumps(point, allow_nan=False).encode() + b"\n"
        self._require_in_place()
        if self._file.write(line) != len(line):
            raise OSError(errno.ENOSPC, "the disk is full", str(self.path))
        self._digest.update(line)
        self._num_bytes += len(line)

    def flush(self) -> None:
        """Block until every point is on the disk."""
        self._require_in_place()
        os.fsync(self._file.fileno())

    @property
    def summary(self) -> dict[str, int | str]:
        """Number and SHA-256 (hex) of the bytes written so far."""
        return {"bytes": self._num_bytes, "sha256": self._digest.hexdigest()}

    def _require_in_place(self) -> None:
        """Raise UsageError unless the path still leads to the file that is open, with the content written so far."""
        status = os.fstat(self._file.fileno())
        try:
            is_in_place = os.path.samestat(status, os.stat(self.path))
        except OSError:
            is_in_place = False
        if not is_in_place:
            raise UsageError(f"{self.path}: was deleted or moved during the run; nothing more can be recorded")
        if status.st_size != self._num_bytes:
            raise UsageError(
                f"{self.path}: was changed by another program during the run"
                f" ({status.st_size} bytes, {self._num_bytes} were written)"
            )

    def truncate_after(self, step: int) -> None:
        """Drop the points of later steps, so that a resumed run never has a step twice."""
        lines = _split_lines(read_plain_file(self.path, None))
        points, _ = read_journal(self.path) if step > 0 else ([], 0)  # a damaged journal may start anew
        kept = b"".join(line for line, point in zip(lines, points, strict=False) if point.step <= step)
        self._replace(kept)

    def truncate_to(self, num_bytes: int) -> None:
        """Keep the first bytes alone."""
        self._replace(read_plain_file(self.path, None)[:num_bytes])

    def _replace(self, content: bytes) -> None:
        self._file.close()
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:  # a new file, not one that a link with this name chooses
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)
        self._open()

    def close(self) -> None:
        """Flush and close the file."""
        if not self._file.closed:
            try:
                self.flush()
            finally:
                self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        with contextlib.suppress(UsageError, OSError):  # `error` came first
            self.close()


def read_journal(path: Path, offset: int = 0) -> tuple[list[Point], int]:
    """Return the points from byte `offset` on, and the offset to continue from.

    An incomplete last line, left by a crash or a write in progress, is left for the next call. A missing file is an
    empty journal. Raises UsageError with file and line for any other damage.
    """
    try:
        content = read_plain_file(path, None, offset)
    except FileNotFoundError:
        return [], offset
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    points = parse_journal(path, content, offset)
    return points, points[-1].end if points else offset


def parse_journal(path: Path, content: bytes, offset: int = 0) -> list[Point]:
    """Return the points in the content of a journal from byte `offset` on; raise UsageError for damage."""
    return list(_parse_lines(path, content, offset))


def read_last_step(path: Path) -> int:
    """Return the largest step in a journal, 0 if it is empty."""
    points, _ = read_journal(path)
    return max((point.step for point in points), default=0)


def _parse_lines(path: Path, content: bytes, offset: int) -> Iterator[Point]:
    end = offset
    for line in _split_lines(content):
        end += len(line)
        try:
            yield _parse_line(line, end)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            number = read_plain_file(path, None)[:end].count(b"\n")
            remove = format_command("rm", path.parent.name, results=Path(*path.parts[:-3]))  # results/runs/ID/file
            raise UsageError(
                f"{path}, line {number}: not a point of a journal ({error}); restore the file, or remove the run"
                f" (`{remove}`) and train it again"
            ) from error


def _split_lines(content: bytes) -> list[bytes]:
    """Return the complete lines. A carriage return ends none: what follows it would count as incomplete."""
    return [line + b"\n" for line in content.split(b"\n")[:-1]]


def _parse_line(line: bytes, end: int) -> Point:
    raw = json.loads(line.decode())
    metrics = {name: float(value) for name, value in raw["metrics"].items()}
    if not _are_valid_names(tuple(metrics)):
        raise ValueError(f"metric name {next(name for name in metrics if not is_valid_metric_name(name))!r}")
    return Point(step=int(raw["step"]), time=float(raw["time"]), metrics=metrics, end=end)


def _to_json(value: float) -> float | str:
    # JSON has no NaN or infinity; float() parses these strings.
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _drop_torn_line(path: Path) -> None:
    if not path.exists():
        return
    content = read_plain_file(path, None)
    complete_bytes = content.rfind(b"\n") + 1
    if complete_bytes != len(content):
        os.truncate(path, complete_bytes)
