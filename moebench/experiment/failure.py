"""The result of a cell that failed: in every table, with its reason."""

import contextlib
import errno
from typing import Any

from moebench.config import resolve
from moebench.errors import UsageError
from moebench.training.model import marks_of
from moebench.training.result import RunResult


def disk_reason(error: OSError) -> str:
    """Return why a file could not be written, in one line."""
    what = error.filename or "a file"
    return (
        f"disk full while writing {what}" if error.errno == errno.ENOSPC else f"cannot write {what}: {error.strerror}"
    )


def failed_result(cell: dict[str, Any], reason: str, *, step: int = 0, total_s: float = 0.0) -> RunResult:
    """Return the result of a cell that failed after `step` steps: nothing is left out of a table, not even this."""
    marks: tuple[str, ...] = ()
    with contextlib.suppress(UsageError):
        marks = marks_of(resolve(cell["config"]))
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
    )
