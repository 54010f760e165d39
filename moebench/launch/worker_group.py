"""The processes of one cell: they are watched together, and ended in bounded time when one of them fails."""

import time
from collections.abc import Sequence
from typing import Any

from moebench.launch.diagnosis import Diagnosis, diagnose
from moebench.launch.local_worker import Worker
from moebench.runs.cell import Cell

REPORT_TIMEOUT_S = 4.0
"""How long the other processes may take to report after the first failure: one of them may have the cause."""


class WorkerGroup:
    """A running cell; `message_delay_s` is how much later messages arrive over a network than through a pipe."""

    def __init__(self, cell: Cell, workers: Sequence[Worker], message_delay_s: float = 0.0) -> None:
        self.cell = cell
        self.workers = workers
        self.collective_timeout_s = cell.config.parallel.timeout_s
        self.report_timeout_s = REPORT_TIMEOUT_S + message_delay_s
        self.started_at = time.monotonic()
        self.deadline = float("inf")

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started_at

    @property
    def waitables(self) -> list[Any]:
        """Objects for `multiprocessing.connection.wait`, of all processes."""
        return [waitable for worker in self.workers for waitable in worker.waitables]

    def take_notes(self) -> list[str]:
        """Return the lines for the user that have arrived since the last call."""
        notes = [f"{self.cell.arm} seed {self.cell.seed}: {note}" for worker in self.workers for note in worker.notes]
        for worker in self.workers:
            worker.notes = ()
        return notes

    def poll(self) -> dict[str, Any] | None:
        """Read the messages of all processes; return the newest progress of rank 0, or None."""
        progress = [worker.poll() for worker in self.workers]
        self.deadline = min(self.deadline, time.monotonic() + self._remaining_s())
        return progress[0]

    @property
    def is_over(self) -> bool:
        """Whether all processes have ended or the time for the remaining ones is up."""
        return all(worker.has_ended for worker in self.workers) or time.monotonic() >= self.deadline

    def _remaining_s(self) -> float:
        """Return how long the others may take once one process has reported its exit, or ended without a report."""
        statuses = [worker.exit_report().status for worker in self.workers]
        if statuses[0] in ("skipped", "busy"):
            return 0.0  # the others wait for rank 0, which does not train
        has_crashed = any(w.has_ended and status is None for w, status in zip(self.workers, statuses, strict=True))
        if has_crashed or "failed" in statuses or statuses[0] is not None:
            return self.report_timeout_s
        if all(status is None for status in statuses):
            return float("inf")
        return self.collective_timeout_s + self.report_timeout_s

    def request_stop(self) -> None:
        """Ask all processes to save a checkpoint and end; they agree on the step by a collective."""
        for worker in self.workers:
            worker.request_stop()

    def kill(self) -> None:
        """Kill all processes that have not ended."""
        for worker in self.workers:
            worker.kill()

    def close(self) -> Diagnosis:
        """Return how the cell ended, and leave no process behind."""
        diagnosis = diagnose([worker.exit_report() for worker in self.workers], self.collective_timeout_s)
        self.kill()
        return diagnosis
