"""The result of a failed cell: one line of text and a `RunResult`."""

import contextlib
import errno
from typing import Any

from moebench.compatibility import list_marks
from moebench.config import resolve
from moebench.errors import UsageError
from moebench.plugin_errors import find_plugin_line
from moebench.runs.result import RunResult


def describe_disk_error(error: OSError) -> str:
    """Return in one line why a file could not be written."""
    file = error.filename or "a file"
    return (
        f"disk full while writing {file}" if error.errno == errno.ENOSPC else f"cannot write {file}: {error.strerror}"
    )


def describe_start_error(error: Exception) -> str:
    """Return in one line why the processes of a cell could not be started."""
    if isinstance(error, OSError) and (error.filename or error.errno == errno.ENOSPC):
        return describe_disk_error(error)
    return describe_exception(error)


def describe_exception(error: BaseException) -> str:
    """Return type, text and, of one that a plug-in raised, file and line of an exception, in one line."""
    if isinstance(error, UsageError):
        return str(error)
    location = find_plugin_line(error)
    where = f" ({location[0]}:{location[1]})" if location else ""
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}{': ' if text else ''}{text}{where}"


def build_failed_result(
    cell: dict[str, Any], reason: str, *, fault: str = "", step: int = 0, total_s: float = 0.0
) -> RunResult:
    """Return the result of a cell that failed after `step` steps; `cell` is the content of its `cell.json`."""
    marks: tuple[str, ...] = ()
    with contextlib.suppress(UsageError):
        marks = list_marks(resolve(cell["config"]))
    return RunResult(
        id=cell["id"],
        arm=cell["arm"],
        seed=cell["seed"],
        status="failed",
        error=reason,
        step=step,
        metrics={},
        cost={},
        throughput={"total_s": total_s},
        data_digest=cell["data"]["digest"],
        eval_digest="",
        marks=marks,
        config=cell["config"],
        fault=fault,
    )
