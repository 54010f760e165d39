"""Turn an exception into the result of a failed cell: one line of text, a `Fault`, a `RunResult`."""

import contextlib
import errno
from typing import Any

import torch
from torch.distributed import DistError
from torch.distributed.checkpoint.api import CheckpointException

from moebench.compatibility import list_marks
from moebench.config import resolve
from moebench.errors import UsageError
from moebench.parallel.replicas import ReplicaError
from moebench.plugin_errors import find_plugin_line
from moebench.runs.result import Fault, RunResult
from moebench.training.divergence import DivergedError

TRANSPORT_NAMES = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL", "TCPStore", "ProcessGroup")
"""Substrings of communication errors, which torch raises as plain RuntimeError."""


def describe_disk_error(error: OSError) -> str:
    """Return in one line why a file could not be written."""
    file = error.filename or "a file"
    return (
        f"disk full while writing {file}" if error.errno == errno.ENOSPC else f"cannot write {file}: {error.strerror}"
    )


def describe_error(error: BaseException) -> str:
    """Return the reason of a failure in one line."""
    if isinstance(error, DivergedError | UsageError):
        return str(error)
    if isinstance(error, CheckpointException):
        rank, (cause, _) = min(error.failures.items())
        is_of_first_rank = len(error.failures) == 1 and rank == 0
        return describe_error(cause) if is_of_first_rank else f"rank {rank}: {describe_error(cause)}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return describe_disk_error(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return f"out of memory: {' '.join(str(error).split())[:200]}"
    place = find_plugin_line(error)
    where = f" ({place[0]}:{place[1]})" if place else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{where}"


def classify_error(error: BaseException) -> Fault:
    """Return the kind of an error."""
    if isinstance(error, DivergedError):
        return Fault.DIVERGED
    if isinstance(error, UsageError | ReplicaError | CheckpointException):
        return Fault.COMMON_ERROR
    text = str(error)
    is_transport = isinstance(error, RuntimeError) and any(name in text for name in TRANSPORT_NAMES)
    if not isinstance(error, DistError) and not is_transport:
        return Fault.PROCESS_ERROR
    return Fault.TIMEOUT if "timed out" in text.lower() or "timeout" in text.lower() else Fault.DISCONNECTED


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
