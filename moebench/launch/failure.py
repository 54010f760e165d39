"""What a failure becomes: one line, what kind of fault it is, and the result of the cell."""

import contextlib
import errno
from typing import Any

import torch
from torch.distributed import DistError
from torch.distributed.checkpoint.api import CheckpointException

from moebench.compatibility import list_marks
from moebench.config import resolve
from moebench.errors import UsageError
from moebench.launch.diagnosis import COMMON, LOST, OWN, WAITED
from moebench.parallel.replicas import ReplicaError
from moebench.runs.result import Fault, RunResult
from moebench.training.module import NonFiniteError

TRANSPORT = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL", "TCPStore", "ProcessGroup")
"""Words in the errors of communication, which have no class of their own."""


def disk_reason(error: OSError) -> str:
    """Return why a file could not be written, in one line."""
    what = error.filename or "a file"
    return (
        f"disk full while writing {what}" if error.errno == errno.ENOSPC else f"cannot write {what}: {error.strerror}"
    )


def explain(error: BaseException) -> str:
    """Return the reason of a failure in one line."""
    if isinstance(error, NonFiniteError | UsageError):
        return str(error)
    if isinstance(error, CheckpointException):
        rank, (cause, _) = min(error.failures.items())
        return explain(cause) if len(error.failures) == 1 and rank == 0 else f"rank {rank}: {explain(cause)}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return disk_reason(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return f"out of memory: {' '.join(str(error).split())[:200]}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def fault_of(error: BaseException) -> str:
    """Return whose fault an error is: see `judgement`."""
    if isinstance(error, NonFiniteError):
        return Fault.DIVERGED
    if isinstance(error, UsageError | ReplicaError | CheckpointException):
        return COMMON
    text = str(error)
    if not isinstance(error, DistError) and not (isinstance(error, RuntimeError) and _is_transport(text)):
        return OWN
    return WAITED if "timed out" in text.lower() or "timeout" in text.lower() else LOST


def _is_transport(text: str) -> bool:
    return any(word in text for word in TRANSPORT)


def failed_result(
    cell: dict[str, Any], reason: str, *, fault: str = "", step: int = 0, total_s: float = 0.0
) -> RunResult:
    """Return the result of a cell that failed after `step` steps: nothing is left out of a table, not even this."""
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
