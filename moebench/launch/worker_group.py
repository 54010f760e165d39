"""The processes of one cell: they are watched together, and ended in bounded time when one of them fails."""

import time
from collections.abc import Sequence
from typing import Any

from moebench.launch.activity import ActivityMonitor
from moebench.launch.diagnosis import Diagnosis, describe_stall, diagnose
from moebench.launch.local_worker import Worker
from moebench.runs.cell import Cell
from moebench.runs.result import Fault

REPORT_TIMEOUT_S = 4.0
"""How long the other processes may take to report after the first failure: one of them may have the cause."""


COLLECTIVE_MARGIN_S = 15.0
"""How much later than a collective times out the cell may be found silent: the collective starts within a step."""


class WorkerGroup:
    """A running cell; `message_delay_s` is how much later messages arrive over a network than through a pipe."""

    def __init__(self, cell: Cell, workers: Sequence[Worker], message_delay_s: float = 0.0) -> None:
        self.cell = cell
        self.workers = workers
        self.collective_timeout_s = cell.config.parallel.timeout_s
        self.report_timeout_s = REPORT_TIMEOUT_S + message_delay_s
        self.started_at = time.monotonic()
        self.deadline = float("inf")
        self.activity = ActivityMonitor()
        self.stall_timeout_s = _choose_stall_timeout(cell, self.report_timeout_s)
        self.stop_requested_at: float | None = None

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started_at

    @property
    def waitables(self) -> list[Any]:
        """Objects for `multiprocessing.connection.wait`, of all processes."""
        return [waitable for worker in self.workers for waitable in worker.waitables]

    def pop_notes(self) -> list[str]:
        """Return the lines for the user that have arrived since the last call."""
        notes = [f"{self.cell.arm} seed {self.cell.seed}: {note}" for worker in self.workers for note in worker.notes]
        for worker in self.workers:
            worker.notes = ()
        return notes

    def poll(self) -> dict[str, Any] | None:
        """Read the messages of all processes; return the newest progress of rank 0, or None."""
        progress = [worker.poll() for worker in self.workers]
        self.activity.update(max(worker.last_message_at for worker in self.workers))
        self.deadline = min(self.deadline, time.monotonic() + self._compute_remaining_s())
        return progress[0]

    @property
    def is_over(self) -> bool:
        """Whether all processes have ended or the time for the remaining ones is up."""
        have_ended = all(worker.has_ended for worker in self.workers)
        return have_ended or time.monotonic() >= self.deadline or self.has_stalled or self.ignores_stop

    @property
    def has_stalled(self) -> bool:
        """Whether no process has finished a step or a batch for `parallel.stall_timeout_s`, and none has reported."""
        return self.deadline == float("inf") and self.activity.silent_s > self.stall_timeout_s

    @property
    def ignores_stop(self) -> bool:
        """Whether the cell was asked to stop and has been silent for longer than its steps take."""
        if self.stop_requested_at is None or self.deadline != float("inf"):
            return False
        silent_s = min(self.activity.silent_s, time.monotonic() - self.stop_requested_at)
        is_saving = any(worker.is_saving and not worker.describe_halt() for worker in self.workers)
        return silent_s > self.activity.stop_timeout_s(is_saving)

    @property
    def step(self) -> int:
        """The last step that a process is known to have completed."""
        return max(worker.exit_report().step for worker in self.workers)

    def _compute_remaining_s(self) -> float:
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
        self.stop_requested_at = time.monotonic()
        for worker in self.workers:
            worker.request_stop()

    def kill(self) -> None:
        """Kill all processes that have not ended."""
        for worker in self.workers:
            worker.kill()

    def close(self) -> Diagnosis:
        """Return how the cell ended, and leave no process behind."""
        reports = [worker.exit_report() for worker in self.workers]
        if self.ignores_stop:
            diagnosis = Diagnosis(status="stopped", error="did not react and was ended; its last checkpoint counts")
        elif self.has_stalled:
            halts = [worker.describe_halt() for worker in self.workers]
            error = describe_stall(reports, halts, self.activity.silent_s)
            diagnosis = Diagnosis(status="failed", error=error, fault=Fault.EXTERNAL)
        else:
            diagnosis = diagnose(reports, self.collective_timeout_s)
        self.kill()
        return diagnosis


def _choose_stall_timeout(cell: Cell, report_timeout_s: float) -> float:
    """Return how long a cell may be silent.

    Where that is not shorter than the timeout of collectives, these come first: they tell which process is missing.
    """
    parallel = cell.config.parallel
    if parallel.world_size == 1 or parallel.stall_timeout_s < parallel.timeout_s:
        return parallel.stall_timeout_s
    return max(parallel.stall_timeout_s, parallel.timeout_s + COLLECTIVE_MARGIN_S + report_timeout_s)
