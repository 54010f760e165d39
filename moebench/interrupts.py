"""Signals that stop a run: collected by a handler, and Ctrl-C before there is one remembered."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Ctrl-C; a batch system, or `kill`; a terminal that is closed; the warning of SLURM before the time is up."""

received: list[int] = []
"""Signals received before `handle_signals`: a library may swallow the KeyboardInterrupt, not the signal."""


def record_interrupts() -> None:
    """Start to append each SIGINT to `received` and to raise KeyboardInterrupt.

    The second one, and one during an import, end the process at once.
    """
    signal.signal(signal.SIGINT, _interrupt)


@contextlib.contextmanager
def handle_signals(handler: Callable[[int], None]) -> Iterator[None]:
    """Call `handler` with the number of each stop signal, those in `received` first, instead of ending.

    SIGHUP stays ignored where it is, as under `nohup`.
    """
    numbers = [number for number in STOP_SIGNALS if number != signal.SIGHUP or not _is_ignored(number)]
    previous = {number: signal.signal(number, lambda received, frame: handler(received)) for number in numbers}
    for number in received:
        handler(number)
    try:
        yield
    finally:
        for number, previous_handler in previous.items():
            signal.signal(number, previous_handler)


def _is_ignored(number: int) -> bool:
    return signal.getsignal(number) == signal.SIG_IGN


def _interrupt(number: int, frame: FrameType | None) -> None:
    received.append(number)
    if len(received) > 1 or _is_importing(frame):
        os._exit(130)
    raise KeyboardInterrupt


def _is_importing(frame: FrameType | None) -> bool:
    """Return whether a module is being imported: its code may swallow KeyboardInterrupt, or abort the process."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
