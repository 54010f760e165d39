"""Live tracking: a separate process that replays run folders while the runs write to them.

The runner communicates with it by pipes only, so it neither imports MLflow nor waits for it. When the runner dies, its
end of the pipe is closed and the process exits.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from moebench.file_access import open_to_write

_GRACE_S = 10.0
"""Seconds for the last replay after the runner has died."""


@dataclass(frozen=True, kw_only=True)
class TrackerStatus:
    """State of the tracking of a run of the runner."""

    ok: bool
    """Whether everything was sent so far."""
    reason: str | None = None
    """Why not, in one line."""
    values: int = 0
    """Number of values sent."""


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
        }
        self._log = results / "tracking.log"
        self._status = TrackerStatus(ok=True)
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None

    @property
    def pid(self) -> int | None:
        """Id of the process; None before the start."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the process; do not wait for it."""
        try:
            with os.fdopen(open_to_write(self._log), "a") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "moebench.tracking.tracker"],
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
            self._status = _degrade(f"the tracker process cannot be started ({error})")
            return
        # By the pipe: the address may contain a password, and a command line is public.
        self._write(self._task)
        self._reader = threading.Thread(target=self._read_status, daemon=True)
        self._reader.start()

    def poll(self) -> str | None:
        """Return why tracking is degraded, in one line, or None while it works; do not wait."""
        return self._status.reason

    def stop(self, timeout_s: float = 30.0) -> TrackerStatus:
        """Send what is pending within `timeout_s` seconds, end the process and return its status."""
        process, self._process = self._process, None
        if process is None or self._reader is None:
            return self._status
        self._write({"stop_s": timeout_s}, process)
        try:
            process.wait(timeout_s + 2)
        except subprocess.TimeoutExpired:
            last_status = self._status
            process.kill()
            process.wait()
            self._reader.join(2)
            self._status = _degrade(f"the tracker did not take everything in {timeout_s:g} s", last_status)
        self._reader.join(2)
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                if pipe:
                    pipe.close()
        return self._status

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
            has_ended = bool(message.pop("last"))
            self._status = TrackerStatus(**message)
        if not has_ended:
            self._status = _degrade(f"the tracker process ended early, see {self._log}", self._status)


def _degrade(reason: str, previous: TrackerStatus | None = None) -> TrackerStatus:
    """Return a degraded status; the reason of a status that was degraded before takes precedence."""
    if previous and previous.reason:
        reason = previous.reason
    elif "moebench sync" not in reason:
        reason += "; nothing is lost: run `moebench sync` later"
    return TrackerStatus(ok=False, reason=reason, values=previous.values if previous else 0)


class _ReplayLoop:
    """The work of the tracker process."""

    def __init__(self, task: dict[str, str], out: IO[str]) -> None:
        self.results, self.uri = Path(task["results"]), task["uri"]
        self.experiment = task["experiment"]
        self.interval_s = float(task["interval_s"])
        self.out = out
        self.stop_event = threading.Event()
        self.status = TrackerStatus(ok=True)

    def run(self) -> None:
        """Replay whenever there may be something new, until the stop event is set; then one last time."""
        previous: object = ()
        wait_s = self.interval_s
        while not self.stop_event.wait(wait_s):
            current = self._fingerprint()
            if current != previous or not self.status.ok:
                previous = current
                self._report(self._replay(is_live=True))
            # Exponential backoff while the tracker does not respond.
            wait_s = self.interval_s if self.status.ok else min(30.0, 2 * wait_s)
        self._report(self._replay(is_live=False) if self._fingerprint() else self.status, is_last=True)

    def _fingerprint(self) -> object:
        from moebench.errors import UsageError
        from moebench.tracking.replay import fingerprint_sources

        try:
            return fingerprint_sources(self.results, self.experiment)
        except UsageError as error:
            return str(error)  # the replay reports it

    def _replay(self, is_live: bool) -> TrackerStatus:
        from moebench.errors import UsageError
        from moebench.tracking.mlflow_store import TrackerError
        from moebench.tracking.replay import replay

        num_sent = self.status.values
        try:
            report = replay(self.results, self.uri, self.experiment, is_live)
        except (TrackerError, UsageError) as error:
            return TrackerStatus(ok=False, reason=str(error), values=num_sent)
        problem = report.problems[0] if report.problems else None
        return TrackerStatus(ok=not problem, reason=problem, values=num_sent + report.values)

    def _report(self, status: TrackerStatus, is_last: bool = False) -> None:
        if status != self.status or is_last:
            self.status = status
            line = {"ok": status.ok, "reason": status.reason, "values": status.values, "last": is_last}
            # The runner may have died.
            with contextlib.suppress(OSError):
                print(json.dumps(line), file=self.out, flush=True)


def _stop_on_request(loop: _ReplayLoop) -> None:
    """Stop the loop when the runner asks for it or dies, and end the process if it takes too long."""
    line = sys.stdin.readline()  # empty when the runner has died and its end of the pipe is closed
    timeout_s = float(json.loads(line)["stop_s"]) if line else _GRACE_S
    loop.stop_event.set()
    time.sleep(timeout_s)
    reason = loop.status.reason or f"the tracker did not take everything in {timeout_s:g} s"
    unfinished = TrackerStatus(ok=False, reason=None, values=loop.status.values)
    loop._report(_degrade(reason, unfinished), is_last=True)
    os._exit(3)


def main() -> None:
    """Run the tracker process: its task is the first line of stdin, its status lines go to stdout."""
    # The output of libraries goes to the log instead.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with contextlib.suppress(OSError):
        os.nice(5)
    task = sys.stdin.readline()
    if not task:
        return
    loop = _ReplayLoop(json.loads(task), out)
    threading.Thread(target=_stop_on_request, args=(loop,), daemon=True).start()
    loop.run()


if __name__ == "__main__":
    main()
