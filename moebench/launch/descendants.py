"""Processes that a plug-in or a library has started below a worker: none outlives the cell.

A process whose parent ends becomes a child of the nearest ancestor that adopts orphans, so everything that a worker
has started stays below it, detached or not, and can be ended with it.
"""

import contextlib
import ctypes
import sys
from collections.abc import Collection, Iterable

import psutil

PR_SET_CHILD_SUBREAPER = 36
KILL_TIMEOUT_S = 2.0
ROUNDS = 5
"""A process may start another one while it is being killed."""


def adopt_orphans() -> None:
    """Make this process the parent of all orphans below it; on Linux, elsewhere nothing changes."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def list_descendants(pid: int) -> list[psutil.Process]:
    """Return all living processes below a process; none if it has ended."""
    with contextlib.suppress(psutil.Error):
        return [
            child for child in psutil.Process(pid).children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE
        ]
    return []


def kill_processes(processes: Iterable[psutil.Process]) -> None:
    """Kill processes that were listed before; one that has ended in the meantime is left alone, whatever has its id."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


def kill_descendants(pid: int, keep: Collection[int] = ()) -> None:
    """Kill all processes below a process but those of `keep` and what is below them."""
    for _ in range(ROUNDS if pid else 0):
        kept = {*keep, *(child.pid for kept in keep for child in list_descendants(kept))}
        processes = [process for process in list_descendants(pid) if process.pid not in kept]
        if not processes:
            return
        kill_processes(processes)
        psutil.wait_procs(processes, timeout=KILL_TIMEOUT_S)
