"""MLflow's UI on a results folder: served on this machine only, and stopped with all its processes."""

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

from moebench.errors import UsageError
from moebench.file_access import open_to_write
from moebench.tracking.address import (
    check_uri,
    connection_uri,
    default_uri,
    format_sync,
    redact_uri,
    require_tracker,
    sqlite_path,
    sqlite_uri,
)
from moebench.tracking.database import ARTIFACTS, find_database_defect, read_experiments, relocate_artifacts
from moebench.tracking.views import build_link, choose_view

_START_LIMIT_S = 120.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ENVIRONMENT = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "PYTHONSAFEPATH": "1",  # no modules of the working folder, such as random.py
    "UVICORN_APP_DIR": os.devnull,  # its default is the working folder, which would come before all others
    "OMP_NUM_THREADS": "1",
}


def serve(
    results: Path,
    uri: str | None = None,
    host: str = "127.0.0.1",
    port: int = 5000,
    on_ready: Callable[[str], None] = print,
) -> int:
    """Serve MLflow's UI until a signal arrives; call `on_ready` with its address once it responds.

    Returns the exit code: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP, 1 when the server ends by itself.
    Raises UsageError for a database that is missing or damaged, a tracker that is a server, and a port in use.
    """
    if uri:
        require_tracker(uri)
        check_uri(uri)
    database = _find_database(results, uri or default_uri(results))
    _check_port(host, port)
    log = results / "ui.log"
    url = f"http://{host}:{port}"
    with _record_signals() as received, _open_log(log) as output:
        server = _launch(database, host, port, output)
        try:
            if _wait_until_ready(server, url, log, received):
                on_ready(url)
            while not received and server.poll() is None:
                time.sleep(0.1)
        finally:
            _stop_process_group(server)
    return 128 + received[0] if received else 1


def list_links(results: Path, uri: str | None, url: str) -> dict[str, str]:
    """Return the address of the charts of each experiment in the UI at `url`, the latest first; none if unreadable."""
    database = sqlite_path(uri or default_uri(results))
    if database is None:
        return {}
    with contextlib.suppress(sqlite3.Error, OSError):
        return {
            name: build_link(url, experiment, choose_view(tags))
            for experiment, name, tags in read_experiments(database)
        }
    return {}


def _open_log(log: Path) -> IO[str]:
    try:
        return os.fdopen(open_to_write(log, os.O_TRUNC), "w")
    except OSError as error:
        raise UsageError(f"{log}: cannot be written ({error.strerror}); the UI writes its log there") from error


def _launch(database: Path, host: str, port: int, output: IO[str]) -> subprocess.Popen[bytes]:
    address = ["--host", host, "--port", str(port), "--workers", "1"]
    artifacts = database.absolute().parent / ARTIFACTS
    uri = connection_uri(sqlite_uri(database))
    stores = ["--backend-store-uri", uri, "--artifacts-destination", artifacts.as_uri()]
    return subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *address, *stores],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        # A process group of its own: MLflow's child processes survive when only their parent is stopped.
        start_new_session=True,
        env={**os.environ, **_ENVIRONMENT},
    )


def _wait_until_ready(server: subprocess.Popen[bytes], url: str, log: Path, received: list[int]) -> bool:
    deadline = time.monotonic() + _START_LIMIT_S
    # This machine is asked, whatever http_proxy says.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while not received:
        if server.poll() is not None or time.monotonic() > deadline:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            raise UsageError(f"MLflow's server did not start: {lines[-1] if lines else 'no message'} ({log})")
        # OSError covers refused connections, timeouts and HTTP errors.
        with contextlib.suppress(OSError), direct.open(f"{url}/health", timeout=2) as response:
            if response.status == 200:
                return True
        time.sleep(0.2)
    return False


@contextmanager
def _record_signals() -> Iterator[list[int]]:
    """Yield the list of signals received so far, in place of their default action."""
    received: list[int] = []

    def record(number: int, frame: FrameType | None) -> None:
        received.append(number)

    previous = {number: signal.signal(number, record) for number in _SIGNALS}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _stop_process_group(server: subprocess.Popen[bytes]) -> None:
    for number, timeout_s in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        deadline = time.monotonic() + timeout_s
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, number)
            while time.monotonic() < deadline:
                # Signal 0 tests whether the group has processes left; poll() reaps its leader.
                server.poll()
                os.killpg(server.pid, 0)
                time.sleep(0.05)
    server.wait()


def _find_database(results: Path, uri: str) -> Path:
    """Return the database of an address; raise UsageError if there is none that MLflow can show."""
    path = sqlite_path(uri)
    if path is None:
        raise UsageError(f"tracker {redact_uri(uri)} is a server with its own UI: open it in a browser")
    if not path.exists():
        raise UsageError(f"{path} does not exist: run an experiment first (`moebench run`)")
    reason = find_database_defect(path)
    if reason:
        raise UsageError(f"{path} {reason}: move it away and run {format_sync(results, uri)} to fill a new one")
    relocate_artifacts(path)
    return path


def _check_port(host: str, port: int) -> None:
    if host not in ("127.0.0.1", "localhost"):
        raise UsageError(f"--host {host}: the UI has no password; allowed: 127.0.0.1, localhost")
    if not 1 <= port <= 65535:
        raise UsageError(f"--port {port}: allowed: 1 to 65535")
    try:
        _bind(host, port)
    except OSError as error:
        raise UsageError(f"--port {port}: {error.strerror or error}; free is {_bind(host, 0)}") from error


def _bind(host: str, port: int) -> int:
    with socket.socket(socket.AF_INET) as listener:
        # As the server does: a port in TIME_WAIT is free.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        return int(listener.getsockname()[1])
