"""Run the command line on a pseudo-terminal."""

import os
import pty
import select
import time
from collections.abc import Sequence

from support.command_line import TIMEOUT_S, CommandLine, WarmCommandLine


def run_in_terminal(
    warm: WarmCommandLine, cli: CommandLine, arguments: Sequence[str], timeout: float = TIMEOUT_S, *, keys: bytes = b""
) -> tuple[int, str]:
    """Run a call whose three streams are a terminal of 100 columns, with `keys` typed ahead.

    Returns the exit code and all output.
    """
    controller, terminal = pty.openpty()
    environment = {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}
    warm.send(cli, ("moebench", *arguments), {"terminal": os.ttyname(terminal)}, environment)
    os.write(controller, keys)
    deadline, output = time.monotonic() + timeout, b""
    while not warm.has_answer():
        assert time.monotonic() < deadline, "the call on a terminal did not end in time"
        output += _read_terminal(controller, wait_s=0.1)
    code = warm.read_code(arguments, timeout)
    output += b"".join(iter(lambda: _read_terminal(controller, wait_s=0), b""))
    os.close(controller)
    os.close(terminal)
    return code, output.decode()


def _read_terminal(descriptor: int, wait_s: float) -> bytes:
    """Return what has been printed, nothing if nothing is within `wait_s`."""
    return os.read(descriptor, 65536) if select.select([descriptor], [], [], wait_s)[0] else b""
