"""The result of a cell that failed: in every table, with its reason."""

import contextlib
from typing import Any

from moebench.config import resolve
from moebench.errors import UsageError
from moebench.training.model import marks_of
from moebench.training.result import RunResult


def failed_result(cell: dict[str, Any], reason: str, total_s: float = 0.0) -> RunResult:
    """Return the result of a cell that failed: nothing is left out of a table, not even this."""
    marks: tuple[str, ...] = ()
    with contextlib.suppress(UsageError):
        marks = marks_of(resolve(cell["config"]))
    return RunResult(
        id=cell["id"],
        arm=cell["arm"],
        seed=cell["seed"],
        status="failed",
        error=reason,
        step=0,
        metrics={},
        cost={},
        throughput={"total_s": total_s},
        data_digest=cell["data"]["digest"],
        eval_digest="",
        marks=marks,
        config=cell["config"],
    )
