"""SIGINT and SIGTERM: collected by a handler, and Ctrl-C before there is one remembered."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

received: list[int] = []
"""Signals received before `handle_signals`: a library may swallow the KeyboardInterrupt, not the signal."""


def record_interrupts() -> None:
    """From now on, append each SIGINT to `received` and raise KeyboardInterrupt."""
    signal.signal(signal.SIGINT, _interrupt)


@contextlib.contextmanager
def handle_signals(handler: Callable[[int], None]) -> Iterator[None]:
    """Call `handler` with the number of each SIGINT and SIGTERM, those in `received` first, instead of ending."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, lambda received, frame: handler(received)) for number in numbers}
    for number in received:
        handler(number)
    try:
        yield
    finally:
        for number, previous_handler in previous.items():
            signal.signal(number, previous_handler)


def _interrupt(number: int, frame: Any) -> None:
    received.append(number)
    raise KeyboardInterrupt
