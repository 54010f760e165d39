"""The live tracker: a process of its own that replays run folders while they grow.

The runner talks to it through a pipe only, so it neither imports MLflow nor waits for it; when the runner
dies the pipe ends, and the tracker with it.
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

_GRACE_S = 10.0


@dataclass(frozen=True, kw_only=True)
class TrackerStatus:
    """Whether everything was sent, why not in one line, and how many values were."""

    ok: bool
    reason: str | None = None
    values: int = 0


class Tracker:
    """Sends the run folders of ``results`` to a tracker every ``interval_s`` seconds, from another process.

    Nothing here raises: a tracker that cannot start, be reached or keep up makes the status degraded, and
    the journals stay for ``moebench sync``.
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
        """The process that sends, None before the start."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start sending; returns at once."""
        try:
            with self._log.open("a") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "moebench.tracking.tracker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    # Ctrl-C is for the runner: the tracker must still send the last points.
                    start_new_session=True,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
        except OSError as error:
            self._status = _degraded(f"the tracker process cannot be started ({error})")
            return
        # By the pipe, because an address may hold a password and a command line is public.
        self._tell(self._task)
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()

    def poll(self) -> str | None:
        """Return the one-line reason while tracking is degraded, None while it works; never waits."""
        return self._status.reason

    def stop(self, timeout_s: float = 30.0) -> TrackerStatus:
        """Send what is left within ``timeout_s`` seconds, end the process and return how it went."""
        process, self._process = self._process, None
        if process is None or self._reader is None:
            return self._status
        self._tell({"stop_s": timeout_s}, process)
        try:
            process.wait(timeout_s + 2)
        except subprocess.TimeoutExpired:
            before = self._status
            process.kill()
            process.wait()
            self._reader.join(2)
            self._status = _degraded(f"the tracker did not take everything in {timeout_s:g} s", before)
        self._reader.join(2)
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                if pipe:
                    pipe.close()
        return self._status

    def _tell(self, message: object, process: "subprocess.Popen[str] | None" = None) -> None:
        process = process or self._process
        if process and process.stdin:
            with contextlib.suppress(OSError):
                process.stdin.write(json.dumps(message) + "\n")
                process.stdin.flush()

    def _listen(self) -> None:
        process = self._process
        if process is None or process.stdout is None:
            return
        said_goodbye = False
        for line in process.stdout:
            message = json.loads(line)
            said_goodbye = bool(message.pop("last"))
            self._status = TrackerStatus(**message)
        if not said_goodbye:
            self._status = _degraded(f"the tracker process ended early, see {self._log}", self._status)


def _degraded(reason: str, before: TrackerStatus | None = None) -> TrackerStatus:
    if before and before.reason:
        reason = before.reason
    elif "moebench sync" not in reason:
        reason += "; nothing is lost: run `moebench sync` later"
    return TrackerStatus(ok=False, reason=reason, values=before.values if before else 0)


class _Sending:
    """The side of the pipe that runs in the tracker process."""

    def __init__(self, task: dict[str, str], out: IO[str]) -> None:
        self.results, self.uri = Path(task["results"]), task["uri"]
        self.experiment = task["experiment"]
        self.interval_s = float(task["interval_s"])
        self.out = out
        self.stopping = threading.Event()
        self.status = TrackerStatus(ok=True)

    def loop(self) -> None:
        """Replay whenever something may be new, until told to stop; then once more."""
        seen: object = ()
        wait_s = self.interval_s
        while not self.stopping.wait(wait_s):
            now = self._sendable()
            if now != seen or not self.status.ok:
                seen = now
                self._say(self._send(live=True))
            # A dead server is asked less and less often.
            wait_s = self.interval_s if self.status.ok else min(30.0, 2 * wait_s)
        self._say(self._send(live=False) if self._sendable() else self.status, last=True)

    def _sendable(self) -> object:
        from moebench.errors import UsageError
        from moebench.tracking.replay import sendable

        try:
            return sendable(self.results, self.experiment)
        except UsageError as error:
            # The replay reports it.
            return str(error)

    def _send(self, live: bool) -> TrackerStatus:
        from moebench.errors import UsageError
        from moebench.tracking.mlflow_store import TrackerError
        from moebench.tracking.replay import replay

        before = self.status.values
        try:
            report = replay(self.results, self.uri, self.experiment, live)
        except (TrackerError, UsageError) as error:
            return TrackerStatus(ok=False, reason=str(error), values=before)
        problem = report.problems[0] if report.problems else None
        return TrackerStatus(ok=not problem, reason=problem, values=before + report.values)

    def _say(self, status: TrackerStatus, last: bool = False) -> None:
        if status != self.status or last:
            self.status = status
            line = {"ok": status.ok, "reason": status.reason, "values": status.values, "last": last}
            # The runner may be gone: then nobody listens.
            with contextlib.suppress(OSError):
                print(json.dumps(line), file=self.out, flush=True)


def _until_told(sending: _Sending) -> None:
    # The end of the pipe is the death of the runner.
    line = sys.stdin.readline()
    limit_s = float(json.loads(line)["stop_s"]) if line else _GRACE_S
    sending.stopping.set()
    time.sleep(limit_s)
    late = TrackerStatus(ok=False, reason=None, values=sending.status.values)
    reason = sending.status.reason or f"the tracker did not take everything in {limit_s:g} s"
    sending._say(_degraded(reason, late), last=True)
    os._exit(3)


def main() -> None:
    """Run the tracker process: its task is the first line of stdin, status lines go to stdout."""
    # Whatever the libraries print belongs in the log.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with contextlib.suppress(OSError):
        os.nice(5)
    first = sys.stdin.readline()
    if not first:
        return
    sending = _Sending(json.loads(first), out)
    threading.Thread(target=_until_told, args=(sending,), daemon=True).start()
    sending.loop()


if __name__ == "__main__":
    main()
