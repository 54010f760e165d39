"""End this process when its parent ends. Imports nothing heavy: the fork server asks for it first of all."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def exit_with_parent() -> None:
    """Have Linux kill this process when its parent ends for any reason.

    The runner starts the fork server, which forks the workers: all end with the runner. `RunnerConnection` notices the
    end of the runner too, but not in a process that is stopped or hangs in C, and the fork server waits for all
    processes that it has forked.
    """
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended just before
            os._exit(1)
