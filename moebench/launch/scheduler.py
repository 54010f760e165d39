"""Run cells, each in its own processes: a crash ends one cell, and a stop leaves all cells resumable."""

import contextlib
import json
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

from moebench.errors import UsageError
from moebench.interrupts import handle_signals
from moebench.launch.containment import Containment
from moebench.launch.diagnosis import Diagnosis
from moebench.launch.failure import build_failed_result, describe_start_error
from moebench.launch.launcher import Launcher
from moebench.launch.worker_group import WorkerGroup
from moebench.runs.attempts import Attempt, record_attempt
from moebench.runs.cell import Cell
from moebench.runs.folder import RunFolder
from moebench.runs.folder_identity import FolderIdentity
from moebench.runs.journal import read_last_step
from moebench.runs.result import Fault

STOP_TIMEOUT_S = 60.0
"""How long the cells may take to complete their step and save, after the first Ctrl-C."""
SAME_SIGNAL_S = 3.0
"""A terminal, torchrun and SLURM may each forward the same Ctrl-C, within this time."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one cell ended in this call: done, failed, stopped, skipped (another runner completed it) or busy."""

    cell: Cell
    status: str
    error: str | None
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    fault: str = ""
    """A `Fault` if the cell failed."""
    attempts: int = 1
    """How often the cell was started in this call."""
    is_retried: bool = False
    """Whether the cell is started again after this failure."""


@dataclass(frozen=True, kw_only=True)
class SchedulePolicy:
    """How many cells run at a time, and what follows a failure."""

    jobs: int = 1
    retries: int = 0
    """How often a failed cell is started again, from its last checkpoint; one that diverged would diverge again."""
    stops_at_failure: bool = False
    """Whether the first failed cell stops the others, with everything saved."""


class Display(Protocol):
    """Shows the progress of a grid."""

    def on_start(self, cell: Cell) -> None:
        """Show that the processes of a cell are started."""

    def on_progress(self, cell: Cell, message: dict[str, Any]) -> None:
        """Show that a cell has completed a step; the message has step, loss, tokens_per_s."""

    def on_end(self, outcome: Outcome) -> None:
        """Show that a cell has ended."""

    def note(self, text: str) -> None:
        """Show a line of text."""


class Interrupted(Exception):  # noqa: N818 - not an error: the user asked for it
    """The runner received a signal, `at` by `time.monotonic`; `outcomes` are those of the cells that had ended.

    `is_repeated`: the user has asked twice, and waits for nothing more.
    """

    def __init__(self, signal_number: int, outcomes: Sequence[Outcome], at: float, *, is_repeated: bool) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number
        self.outcomes = outcomes
        self.at, self.is_repeated = at, is_repeated


class Scheduler:
    """Runs cells as a policy says; `launcher` starts their processes.

    Training alone fails a cell, and a failure ends one cell alone: what displays, draws and tracks raises into
    `containment`.
    """

    def __init__(
        self,
        results: Path,
        experiment: str,
        policy: SchedulePolicy,
        display: Display,
        launcher: Launcher,
        containment: Containment | None = None,
    ) -> None:
        self.results = results
        self.experiment = experiment
        self.policy = policy
        self.jobs = min(policy.jobs, launcher.max_jobs) if launcher.max_jobs else policy.jobs
        self.display = display
        self.launcher = launcher
        self.containment = containment or Containment()
        self.groups: list[WorkerGroup] = []
        self.signals: list[tuple[int, float]] = []
        """Number and time of each signal."""
        self.num_starts: Counter[str] = Counter()
        """Id -> how often the cell was started."""
        self.has_failed_fast = False

    def run(
        self,
        cells: Sequence[Cell],
        on_tick: Callable[[], None] = lambda: None,
        on_end: Callable[[Outcome], None] = lambda outcome: None,
    ) -> list[Outcome]:
        """Train the cells in order and return their outcomes; raise Interrupted after a signal that stops a run.

        `on_tick` is called a few times a second, `on_end` after each cell. Raises UsageError when the results folder is
        deleted or moved meanwhile.
        """
        queue = deque(cells)
        outcomes: list[Outcome] = []
        self.results.mkdir(parents=True, exist_ok=True)
        with handle_signals(self._record_signal), FolderIdentity(self.results) as identity:
            try:
                while (queue and not self._is_stopping) or self.groups:
                    identity.require_in_place()
                    for outcome in (*self._start_cells(queue), *self._poll()):
                        if outcome.is_retried:
                            queue.appendleft(outcome.cell)
                            continue
                        outcomes.append(outcome)
                        self.has_failed_fast |= self.policy.stops_at_failure and outcome.status == "failed"
                        with self.containment.contain("after a cell"):
                            on_end(outcome)
                    with self.containment.contain("tracker"):
                        on_tick()
                    if self._is_stopping:
                        outcomes += self._stop_all()
                        break
                identity.require_in_place()
            finally:
                for group in self.groups:
                    group.kill()
                    self._release(group.cell)
        if self.signals:
            number, at = self.signals[0]
            raise Interrupted(number, outcomes, at, is_repeated=self._is_signalled_twice)
        return outcomes

    @property
    def _is_stopping(self) -> bool:
        return bool(self.signals) or self.has_failed_fast

    def _record_signal(self, number: int) -> None:
        self.signals.append((number, time.monotonic()))

    def _start_cells(self, queue: deque[Cell]) -> Iterator[Outcome]:
        """Start cells until `jobs` are running; yield the outcome of each cell that cannot be started."""
        while queue and not self._is_stopping and len(self.groups) < self.jobs:
            cell = queue.popleft()
            self.num_starts[cell.id] += 1
            with self.containment.contain("display"):
                self.display.on_start(cell)
            try:
                RunFolder.of(self.results, cell.id).write_cell(cell.to_dict(self.experiment))
                workers = self.launcher.start(cell, self.results)
                self.groups.append(WorkerGroup(cell, workers, self.launcher.message_delay_s))
            except (OSError, RuntimeError, ValueError, UsageError) as error:
                self._release(cell)
                reason = describe_start_error(error)
                yield self._end(cell, Diagnosis(status="failed", error=reason, fault=Fault.PROCESS_ERROR), 0.0)

    def _poll(self, timeout: float = 0.2) -> Iterator[Outcome]:
        """Read the messages of all cells, and yield the outcomes of those that have ended."""
        waitables = [waitable for group in self.groups for waitable in group.waitables]
        if waitables:
            wait(waitables, timeout)
        else:
            time.sleep(timeout)
        ended = []
        for group in self.groups:
            progress = group.poll()
            with self.containment.contain("display"):
                for note in group.pop_notes():
                    self.display.note(note)
            if progress is not None:
                with self.containment.contain("display"):
                    self.display.on_progress(group.cell, progress)
            if group.is_over:
                ended.append(group)
        stop_signal = self.launcher.stop_signal()
        if stop_signal is not None and not self.signals:
            self._record_signal(stop_signal)
        for group in ended:
            self.groups.remove(group)
            yield self._close(group)

    def _close(self, group: WorkerGroup) -> Outcome:
        diagnosis = group.close()
        self._release(group.cell)
        has_failed = diagnosis.status == "failed"
        errors = (Fault.PROCESS_ERROR, Fault.COMMON_ERROR, Fault.DIVERGED)
        if has_failed and self.signals and diagnosis.fault not in errors:
            diagnosis = Diagnosis(status="stopped")  # the signal to the runner has ended some of the workers as well
        elif has_failed:
            with self.containment.contain("result of a failure"):
                self._write_failed_result(group, diagnosis)
        with self.containment.contain("record of an attempt"):
            self._record_attempt(group, diagnosis)
        return self._end(group.cell, diagnosis, group.elapsed_s)

    def _end(self, cell: Cell, diagnosis: Diagnosis, seconds: float) -> Outcome:
        """Return the outcome of a cell, and display it."""
        num_starts = self.num_starts[cell.id]
        can_improve = diagnosis.status == "failed" and diagnosis.fault != Fault.DIVERGED
        outcome = Outcome(
            cell=cell,
            status=diagnosis.status,
            error=diagnosis.error,
            metrics=diagnosis.metrics,
            seconds=seconds,
            fault=diagnosis.fault,
            attempts=num_starts,
            is_retried=can_improve and num_starts <= self.policy.retries and not self._is_stopping,
        )
        with self.containment.contain("display"):
            self.display.on_end(outcome)
        return outcome

    def _release(self, cell: Cell) -> None:
        with self.containment.contain("release of devices"):
            self.launcher.release(cell)

    def _write_failed_result(self, group: WorkerGroup, diagnosis: Diagnosis) -> None:
        """Write the result of a failure; only the runner has the reports of all processes."""
        folder = RunFolder.of(self.results, group.cell.id)
        step = group.step
        with self.containment.contain(f"journal of {group.cell.arm}, seed {group.cell.seed}"):
            step = read_last_step(folder.journal)
        with contextlib.suppress(OSError):  # a full disk as well
            cell = json.loads(json.dumps(group.cell.to_dict(self.experiment)))
            reason = str(diagnosis.error)
            result = build_failed_result(cell, reason, fault=diagnosis.fault, step=step, total_s=group.elapsed_s)
            folder.write_result(result)

    def _record_attempt(self, group: WorkerGroup, diagnosis: Diagnosis) -> None:
        attempt = Attempt(
            started_at=time.time() - group.elapsed_s,
            seconds=group.elapsed_s,
            status=diagnosis.status,
            error=diagnosis.error,
            fault=diagnosis.fault,
            step=group.step,
        )
        record_attempt(RunFolder.of(self.results, group.cell.id).attempts, attempt)

    def _stop_all(self) -> list[Outcome]:
        """Ask the cells to save and end, and wait until they have; a second signal ends the wait."""
        reason = "a cell failed (--fail-fast); " if self.has_failed_fast and not self.signals else ""
        with self.containment.contain("display"):
            hint = "again" if self.signals else "Ctrl-C"
            self.display.note(f"stopping: {reason}saving checkpoints ({hint}: stop now, from the last checkpoint)")
        for group in self.groups:
            group.request_stop()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        outcomes: list[Outcome] = []
        while self.groups and not self._is_signalled_twice and time.monotonic() < deadline:
            outcomes += self._poll()
        return outcomes

    @property
    def _is_signalled_twice(self) -> bool:
        """Whether the user has asked twice; in a cluster the same signal may arrive several times."""
        if self.has_failed_fast:  # the stop was not asked for, so the first signal ends the wait
            return bool(self.signals)
        first_until = self.signals[0][1] + (SAME_SIGNAL_S if self.launcher.max_jobs else 0.0)
        return any(received_at > first_until for _, received_at in self.signals[1:])
