"""Ctrl-C while nobody listens for it yet: remembered, for a library that swallows the exception must not lose it."""

import signal
from typing import Any

heard: list[int] = []
"""Signals that came before a runner listened."""


def remember() -> None:
    """From now on, note a Ctrl-C as well as raising KeyboardInterrupt."""
    signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame: Any) -> None:
    heard.append(number)
    raise KeyboardInterrupt
