"""Turn the exception of a worker into one line of text and a `Fault`.

Apart from `failure.py` because it imports the trainer, which the runner does not need.
"""

import errno

import torch
from torch.distributed import DistError
from torch.distributed.checkpoint.api import CheckpointException

from moebench.errors import UsageError
from moebench.launch.failure import describe_disk_error
from moebench.parallel.replicas import ReplicaError
from moebench.plugin_errors import find_plugin_line
from moebench.runs.result import Fault
from moebench.training.module import NonFiniteError

TRANSPORT_NAMES = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL", "TCPStore", "ProcessGroup")
"""Substrings of communication errors, which torch raises as plain RuntimeError."""


def describe_error(error: BaseException) -> str:
    """Return the reason of a failure in one line."""
    if isinstance(error, NonFiniteError | UsageError):
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
    if isinstance(error, NonFiniteError):
        return Fault.DIVERGED
    if isinstance(error, UsageError | ReplicaError | CheckpointException):
        return Fault.COMMON_ERROR
    text = str(error)
    is_transport = isinstance(error, RuntimeError) and any(name in text for name in TRANSPORT_NAMES)
    if not isinstance(error, DistError) and not is_transport:
        return Fault.PROCESS_ERROR
    return Fault.TIMEOUT if "timed out" in text.lower() or "timeout" in text.lower() else Fault.DISCONNECTED
