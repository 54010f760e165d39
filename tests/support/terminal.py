"""Run the command line on a pseudo-terminal."""

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from support.command_line import TIMEOUT_S, CommandLine


def run_in_terminal(
    cli: CommandLine, arguments: Sequence[str], timeout: float = TIMEOUT_S, *, keys: bytes = b""
) -> tuple[int, str]:
    """Run a call whose three streams are a terminal of 100 columns, with `keys` typed ahead.

    Returns the exit code and all output.
    """
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "moebench", *arguments],
        cwd=cli.folder,
        env=cli.environment | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    os.write(controller, keys)
    output = b"".join(_read_terminal(controller, time.monotonic() + timeout))
    os.close(controller)
    return process.wait(timeout=10), output.decode()


def _read_terminal(descriptor: int, deadline: float) -> Iterator[bytes]:
    while time.monotonic() < deadline:
        if not select.select([descriptor], [], [], 0.2)[0]:
            continue
        try:
            chunk = os.read(descriptor, 65536)
        except OSError:  # the other side is closed
            return
        if not chunk:
            return
        yield chunk
    raise AssertionError("the call on a terminal did not end in time")
