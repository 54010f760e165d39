"""Turn the exception of a worker into one line of text and a `Fault`.

Apart from `failure.py` because it imports the trainer, which the runner does not need.
"""

import contextlib
import errno

import torch
from torch.distributed import DistError
from torch.distributed.checkpoint.api import CheckpointException

from moebench.errors import UsageError
from moebench.launch.failure import describe_disk_error, describe_exception
from moebench.parallel.replicas import ReplicaError
from moebench.plugin_errors import find_plugin_line
from moebench.runs.folder import RunFolder
from moebench.runs.result import Fault
from moebench.training.divergence import DivergedError

TRANSPORT_NAMES = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL", "TCPStore", "ProcessGroup")
"""Substrings of communication errors, which torch raises as plain RuntimeError."""

ALLOCATION_FAILURES = (
    "DefaultCPUAllocator: ",
    "not enough memory: you tried to allocate",
    "can't allocate memory",
    "Cannot allocate memory",
    "std::bad_alloc",
    "CUDA out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
)
"""Substrings of failed allocations, which torch raises as plain RuntimeError."""


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
    if is_out_of_memory(error):
        return f"out of memory: {' '.join(str(error).split())[:200]}"
    return describe_exception(error)


def describe_cell_error(error: BaseException, folder: RunFolder) -> str:
    """Return the reason of a failure of a cell in one line, with its plug-ins where no line of them raised the error.

    They may have returned what the code that raised it cannot use.
    """
    text = describe_error(error)
    is_known = isinstance(error, UsageError | OSError) or is_out_of_memory(error) or find_plugin_line(error) is not None
    if is_known or classify_error(error) is not Fault.PROCESS_ERROR:
        return text
    plugins: list[str] = []
    with contextlib.suppress(UsageError, OSError):  # a lost folder may be the reason
        plugins = folder.read_cell().get("plugins", [])
    return f"{text} (plug-ins of the cell: {', '.join(plugins)})" if plugins else text


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed; torch raises plain RuntimeError for one of host memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in ALLOCATION_FAILURES)


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
