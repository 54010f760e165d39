"""The process that workers are forked from: it has imported torch and lightning, so that only one process waits."""

import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from multiprocessing import forkserver, get_context, resource_tracker, util

import psutil

from moebench.interrupts import STOP_SIGNALS

CONTEXT = get_context("forkserver")
MAX_SOCKET_FOLDER_LENGTH = 60
"""Longest temporary folder in which the server's socket fits: a path of AF_UNIX has at most 107 bytes."""
SHORT_TEMPORARY_FOLDER = "/tmp"
KILL_WAIT_S = 1.0
ENVIRONMENT = {
    # Of a notebook: torchmetrics imports matplotlib, which refuses an unknown backend.
    "MPLBACKEND": "Agg",
    # Files of the working folder, such as random.py, must not take the place of modules.
    "PYTHONSAFEPATH": "1",
}


def start_fork_server() -> None:
    """Start the server unless it is running, with the signals that stop a run blocked from the start.

    Ctrl-C reaches the whole process group, and would interrupt the server's imports with a traceback.
    """
    CONTEXT.set_forkserver_preload(["moebench.launch.forkserver_preload"])
    resource_tracker.ensure_running()  # starting it unblocks signals, so it comes first
    # Blocked rather than ignored: child processes inherit both, but a blocked signal is delivered to the runner later.
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        with _server_environment(), _short_socket_folder():
            forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)


def resume_fork_server() -> bool:
    """Continue the server if a signal has stopped it, and return whether one had; nobody else would."""
    server = _server_process()
    with contextlib.suppress(psutil.Error):
        if server is not None and server.status() == psutil.STATUS_STOPPED:
            server.send_signal(signal.SIGCONT)
            return True
    return False


def end_fork_server() -> None:
    """Kill the server, which has not answered; the next worker starts another."""
    server = _server_process()
    with contextlib.suppress(psutil.Error):
        if server is not None:
            server.kill()
            deadline = time.monotonic() + KILL_WAIT_S
            # Until it has ended, multiprocessing takes it for alive; it must not be waited for, which it does itself.
            while server.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
                time.sleep(0.01)


def _server_process() -> psutil.Process | None:
    process_id = getattr(getattr(forkserver, "_forkserver", None), "_forkserver_pid", None)
    try:
        return psutil.Process(process_id) if process_id else None
    except psutil.Error:
        return None


@contextlib.contextmanager
def _server_environment() -> Iterator[None]:
    """Set the environment that the server, and by it every worker, inherits."""
    previous = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in previous.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _short_socket_folder() -> Iterator[None]:
    """Have multiprocessing put its sockets into a folder whose path is short enough for them."""
    if len(os.fsencode(tempfile.gettempdir())) > MAX_SOCKET_FOLDER_LENGTH:
        previous, tempfile.tempdir = tempfile.tempdir, SHORT_TEMPORARY_FOLDER
        try:
            with contextlib.suppress(OSError):
                util.get_temp_dir()  # created now, and kept for this process
        finally:
            tempfile.tempdir = previous
    yield
