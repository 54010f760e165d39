"""The journal of a run: a file with one line for every point that the run records."""

import json
import math
import posixpath
import re
import time as clock
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from moebench.commands import format_command
from moebench.errors import UsageError
from moebench.file_access import read_plain_file
from moebench.runs.append_only_file import AppendOnlyFile

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


class Journal(AppendOnlyFile):
    """An append-only file of points."""

    def append(self, step: int, metrics: Mapping[str, float], time: float | None = None) -> None:
        """Add one point, measured now unless `time` (unix seconds) is given.

        Raises ValueError for a metric name that no tracker would accept and OSError for a full disk.
        """
        for name in metrics:
            if not is_valid_metric_name(name):
                raise ValueError(f"metric name {name!r}: allowed are letters, digits and _ - . : / space")
        values = {name: _to_json(float(value)) for name, value in metrics.items()}
        point = {"step": int(step), "time": clock.time() if time is None else float(time), "metrics": values}
        self.append_line(json.dumps(point, allow_nan=False).encode())

    def truncate_after(self, step: int) -> None:
        """Drop the points of later steps, so that a resumed run never has a step twice."""
        lines = _split_lines(read_plain_file(self.path, None))
        points, _ = read_journal(self.path) if step > 0 else ([], 0)  # a damaged journal may start anew
        kept = b"".join(line for line, point in zip(lines, points, strict=False) if point.step <= step)
        self._replace(kept)


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
