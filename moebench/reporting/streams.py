"""Standard streams whose reader may end: a closed pipe or terminal and a full disk end no training."""

import io
import sys
from typing import Any, TextIO

from rich.console import Console

from moebench.reporting.console import SafeConsole


class DurableStream:
    """A text stream that drops what cannot be written, from the first error on; otherwise it is the stream inside."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._has_failed = False

    def write(self, text: str) -> int:
        """Write a text, or drop it."""
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream, unless it has failed."""
        self._try(self._stream.flush)

    def isatty(self) -> bool:
        """Return whether the stream is a terminal that is still there."""
        return not self._has_failed and self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, call: Any, *arguments: Any) -> None:
        if self._has_failed:
            return
        try:
            call(*arguments)
        except (OSError, ValueError):  # ValueError: the stream is closed
            self._has_failed = True


def open_stderr_console(*, quiet: bool = False) -> Console:
    """Return a console on standard error that outlives its reader."""
    file: Any = DurableStream(sys.stderr) if sys.stderr is not None else io.StringIO()
    return SafeConsole(file=file, stderr=True, quiet=quiet)
