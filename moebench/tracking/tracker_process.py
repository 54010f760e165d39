"""The process of a tracker: it replays run folders until the runner asks it to stop, or dies."""

import contextlib
import io
import json
import os
import sys
import threading
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from typing_extensions import override

from moebench.errors import UsageError
from moebench.tracking.address import redact_text
from moebench.tracking.tracker import TrackerStatus

_GRACE_S = 10.0
"""Seconds for the last replay after the runner has died."""
_REPORT_INTERVAL_S = 0.5
_MAX_BACKOFF_S = 30.0


class ReplayLoop:
    """Replays one experiment again and again, and reports the status in one line of JSON after each change."""

    def __init__(self, task: dict[str, Any], out: IO[str]) -> None:
        self.results, self.uri = Path(task["results"]), str(task["uri"])
        self.experiment = task["experiment"]
        self.interval_s, self.remedy = float(task["interval_s"]), str(task["remedy"])
        self.out = out
        self.stop_event = threading.Event()
        self.status = TrackerStatus(ok=True)
        self.reported_at = 0.0

    def run(self) -> None:
        """Replay whenever there may be something new, until the stop event is set; then one last time."""
        from moebench.tracking.quiet import silence_mlflow

        with silence_mlflow():
            pass  # imports MLflow, which takes seconds
        self._report(self.status)
        previous: object = ()
        wait_s = self.interval_s
        while not self.stop_event.wait(wait_s):
            current = self._fingerprint()
            if current != previous or not self.status.ok:
                previous = current
                self._update(self._replay(is_live=True))
            # Exponential backoff while the tracker does not respond.
            wait_s = self.interval_s if self.status.ok else min(_MAX_BACKOFF_S, 2 * wait_s)
        self._report(self._replay(is_live=False) if self._fingerprint() else self.status, is_last=True)

    def _fingerprint(self) -> object:
        from moebench.tracking.replay import fingerprint_sources

        try:
            return fingerprint_sources(self.results, self.experiment)
        except UsageError as error:
            return str(error)  # the replay reports it

    def _replay(self, is_live: bool) -> TrackerStatus:
        from moebench.tracking.mlflow_store import TrackerError
        from moebench.tracking.replay import replay

        num_sent = self.status.values
        try:
            report = replay(self.results, self.uri, self.experiment, is_live, self._report_progress)
        except TrackerError as error:
            reason = f"{error}; {self.remedy}"
            return TrackerStatus(ok=False, reason=reason, values=num_sent)
        except UsageError as error:
            return TrackerStatus(ok=False, reason=str(error), values=num_sent)
        problem = report.problems[0] if report.problems else None
        return TrackerStatus(ok=not problem, reason=problem, values=num_sent + report.values)

    def _report_progress(self) -> None:
        """Tell the runner that the tracker answers, a few times a second at most."""
        if time.monotonic() - self.reported_at > _REPORT_INTERVAL_S:
            self._report(self.status)

    def _update(self, status: TrackerStatus) -> None:
        if status != self.status:
            self._report(status)

    def _report(self, status: TrackerStatus, *, is_last: bool = False) -> None:
        self.status, self.reported_at = status, time.monotonic()
        # The runner may have died.
        with contextlib.suppress(OSError):
            print(json.dumps(asdict(status) | {"is_last": is_last}), file=self.out, flush=True)


class RedactingStream(io.TextIOBase):
    """A log file whose lines never contain what is secret in the address of the tracker."""

    def __init__(self, stream: IO[str], uri: str) -> None:
        self.stream, self.uri = stream, uri

    @override
    def write(self, text: str) -> int:
        self.stream.write(redact_text(text, self.uri))
        return len(text)

    @override
    def flush(self) -> None:
        self.stream.flush()


def main() -> None:
    """Run the tracker process: its task is the first line of stdin, its status lines go to stdout."""
    # The output of libraries goes to the log instead.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with contextlib.suppress(OSError):
        os.nice(5)
    line = sys.stdin.readline()
    if not line:
        return
    loop = ReplayLoop(json.loads(line), out)
    sys.stdout = sys.stderr = RedactingStream(sys.stderr, loop.uri)
    threading.Thread(target=_stop_on_request, args=(loop,), daemon=True).start()
    try:
        loop.run()
    except Exception:
        # The interpreter would print it after the stream is gone.
        sys.stderr.write(traceback.format_exc())
        sys.stderr.flush()
        os._exit(1)


def _stop_on_request(loop: ReplayLoop) -> None:
    """Stop the loop when the runner asks for it or dies; after its death, end the process if it takes too long."""
    is_requested = bool(sys.stdin.readline())
    loop.stop_event.set()
    if is_requested:
        sys.stdin.readline()  # empty when the runner has died and its end of the pipe is closed
    time.sleep(_GRACE_S)
    os._exit(3)


if __name__ == "__main__":
    main()
