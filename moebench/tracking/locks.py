"""File locks whose holders may take long: waiting for one is shown as progress."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def hold_lock(path: Path, timeout_s: int, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold a file lock; call `on_wait` every second until it is free. Raises filelock.Timeout after `timeout_s`."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    for second in range(timeout_s):
        try:
            lock.acquire(timeout=1)
            break
        except Timeout:
            if second == timeout_s - 1:
                raise
            on_wait()
    try:
        yield
    finally:
        lock.release()
