"""The lock of a run folder, which the process that trains the run holds."""

from filelock import FileLock, Timeout

from moebench.runs.folder import RunFolder


def is_being_trained(folder: RunFolder, *, default: bool = False) -> bool:
    """Return whether a process holds the lock of a run; `default` where the system does not let this be known."""
    if not folder.lock.exists():
        return False
    try:
        with FileLock(folder.lock, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        return default
