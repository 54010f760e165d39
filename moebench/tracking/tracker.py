"""Live tracking: a separate process that replays run folders while the runs write to them.

The runner communicates with it by pipes only, so it neither imports MLflow nor waits for it. When the runner dies, its
end of the pipe is closed and the process exits.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from moebench.file_access import open_to_write
from moebench.tracking.address import format_sync, redact_uri

STALL_LIMIT_S = 30.0
"""Seconds that a stopping tracker may take without any progress."""
_START_LIMIT_S = 120.0
"""Seconds that the process may take to import MLflow, on a machine that is busy with other work."""
_NOTICE_S = 2.0
"""Seconds after which the user is told what is being waited for."""


@dataclass(frozen=True, kw_only=True)
class TrackerStatus:
    """State of the tracking of a run of the runner."""

    ok: bool
    """Whether everything was sent so far."""
    reason: str | None = None
    """Why not, in one line."""
    values: int = 0
    """Number of values sent."""

    def degrade(self, reason: str) -> "TrackerStatus":
        """Return the status after a failure; the reason of an earlier one takes precedence."""
        return replace(self, ok=False, reason=self.reason or reason)


class Tracker:
    """Sends the run folders of `results` to a tracker every `interval_s` seconds, from another process.

    No method raises: a tracker that cannot be started, reached or kept up with makes the status degraded, and the
    journals remain for `moebench sync`.
    """

    def __init__(self, results: Path, uri: str, experiment_name: str | None = None, interval_s: float = 2.0) -> None:
        self._task = {
            "results": str(results.absolute()),
            "uri": uri,
            "experiment": experiment_name,
            "interval_s": interval_s,
            "remedy": f"nothing is lost: {format_sync(results, uri)} or the next run sends the rest",
        }
        self._log = results / "tracking.log"
        self._status = TrackerStatus(ok=True)
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._progressed_at, self._has_started = 0.0, False

    @property
    def pid(self) -> int | None:
        """Id of the process; None before the start."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the process; do not wait for it."""
        try:
            with os.fdopen(open_to_write(self._log), "a") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "moebench.tracking.tracker_process"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    # Without the runner's Ctrl-C: the last points must still be sent.
                    start_new_session=True,
                    # Files of the working folder, such as mlflow.py, must not take the place of modules.
                    env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"},
                )
        except OSError as error:
            self._degrade(f"the tracker process cannot be started ({error})")
            return
        # By the pipe: the address may contain a password, and a command line is public.
        self._write(self._task)
        self._reader = threading.Thread(target=self._read_status, daemon=True)
        self._reader.start()

    def poll(self) -> str | None:
        """Return why tracking is degraded, in one line, or None while it works; do not wait."""
        return self._status.reason

    def stop(
        self,
        limit_s: float = math.inf,
        stall_limit_s: float = STALL_LIMIT_S,
        on_wait: Callable[[TrackerStatus], None] = lambda status: None,
    ) -> TrackerStatus:
        """Send what is pending, end the process and return its status.

        A tracker is waited for as long as it makes progress, but not longer than `limit_s`; KeyboardInterrupt ends the
        wait at once. `on_wait` is called when there is something to wait for.
        """
        process, self._process = self._process, None
        if process is None or self._reader is None:
            return self._status
        self._write({"stop": True}, process)
        stopped_at = self._progressed_at = time.monotonic()
        reason = None
        try:
            while process.poll() is None and reason is None:
                time.sleep(0.02)
                now = time.monotonic()
                if _NOTICE_S < now - stopped_at < limit_s:
                    on_wait(self._status)
                    on_wait = _ignore
                if now - stopped_at > limit_s:
                    reason = f"not everything was sent within {limit_s:.2g} s of the end of training"
                elif now - self._progressed_at > (stall_limit_s if self._has_started else _START_LIMIT_S):
                    reason = f"no answer for {stall_limit_s:g} s"
        except KeyboardInterrupt:
            reason = "interrupted before everything was sent"
        if reason:  # first: the end of the process is reported too
            self._degrade(f"tracker {redact_uri(str(self._task['uri']))}: {reason}")
        self._end(process)
        return self._status

    def kill(self) -> None:
        """End the process at once."""
        process, self._process = self._process, None
        if process:
            self._end(process)

    def _end(self, process: "subprocess.Popen[str]") -> None:
        with contextlib.suppress(KeyboardInterrupt):
            process.kill()
            process.wait()
            if self._reader:
                self._reader.join(2)
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                if pipe:
                    pipe.close()

    def _write(self, message: object, process: "subprocess.Popen[str] | None" = None) -> None:
        process = process or self._process
        if process and process.stdin:
            with contextlib.suppress(OSError):
                process.stdin.write(json.dumps(message) + "\n")
                process.stdin.flush()

    def _read_status(self) -> None:
        process = self._process
        if process is None or process.stdout is None:
            return
        has_ended = False
        for line in process.stdout:
            message = json.loads(line)
            self._progressed_at, self._has_started = time.monotonic(), True
            has_ended = bool(message.pop("is_last"))
            self._status = TrackerStatus(**message)
        if not has_ended:
            self._degrade(f"the tracker process ended early, see {self._log}")

    def _degrade(self, reason: str) -> None:
        self._status = self._status.degrade(f"{reason}; {self._task['remedy']}")


def format_tracker_problem(problem: str) -> str:
    """Return the line that says what a tracker has missed: most problems name the tracker themselves."""
    return problem if problem.startswith(("tracker ", "the tracker ")) else f"tracker: {problem}"


def _ignore(status: TrackerStatus) -> None:
    pass
