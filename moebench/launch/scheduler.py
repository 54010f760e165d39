"""Run cells, each in its own processes: a crash ends one cell, and a stop leaves all cells resumable."""

import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

from moebench.interrupts import handle_signals
from moebench.launch.diagnosis import Diagnosis
from moebench.launch.failure import build_failed_result, describe_disk_error
from moebench.launch.launcher import Launcher
from moebench.launch.local_worker import start_fork_server
from moebench.launch.worker_group import WorkerGroup
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
    """The runner received a signal; `outcomes` are those of the cells that had ended."""

    def __init__(self, signal_number: int, outcomes: Sequence[Outcome]) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number
        self.outcomes = outcomes


class Scheduler:
    """Runs at most `jobs` cells at a time; `launcher` starts their processes."""

    def __init__(self, results: Path, experiment: str, jobs: int, display: Display, launcher: Launcher) -> None:
        self.results = results
        self.experiment = experiment
        self.jobs = min(jobs, launcher.max_jobs) if launcher.max_jobs else jobs
        self.display = display
        self.launcher = launcher
        self.groups: list[WorkerGroup] = []
        self.signals: list[tuple[int, float]] = []
        """Number and time of each signal."""

    def run(
        self,
        cells: Sequence[Cell],
        on_tick: Callable[[], None] = lambda: None,
        on_end: Callable[[Outcome], None] = lambda outcome: None,
    ) -> list[Outcome]:
        """Train the cells in order and return their outcomes; raise Interrupted after Ctrl-C or SIGTERM.

        `on_tick` is called a few times a second, `on_end` after each cell. Raises UsageError when the results folder is
        deleted or moved meanwhile.
        """
        queue = list(cells)
        outcomes: list[Outcome] = []
        self.results.mkdir(parents=True, exist_ok=True)
        with handle_signals(self._record_signal), FolderIdentity(self.results) as place:
            start_fork_server()
            try:
                while (queue and not self.signals) or self.groups:
                    place.require_in_place()
                    for outcome in (*self._start_cells(queue), *self._poll()):
                        outcomes.append(outcome)
                        on_end(outcome)
                    on_tick()
                    if self.signals:
                        outcomes += self._stop_all()
                        break
                place.require_in_place()
            finally:
                for group in self.groups:
                    group.kill()
                    self.launcher.release(group.cell)
        if self.signals:
            raise Interrupted(self.signals[0][0], outcomes)
        return outcomes

    def _record_signal(self, number: int) -> None:
        self.signals.append((number, time.monotonic()))

    def _start_cells(self, queue: list[Cell]) -> Iterator[Outcome]:
        """Start cells until `jobs` are running; yield the outcome of each cell whose run folder cannot be written."""
        while queue and not self.signals and len(self.groups) < self.jobs:
            cell = queue.pop(0)
            self.display.on_start(cell)
            try:
                RunFolder.of(self.results, cell.id).write_cell(cell.to_dict(self.experiment))
                workers = self.launcher.start(cell, self.results)
                self.groups.append(WorkerGroup(cell, workers, self.launcher.message_delay_s))
            except OSError as error:
                self.launcher.release(cell)
                outcome = Outcome(cell=cell, status="failed", error=describe_disk_error(error))
                self.display.on_end(outcome)
                yield outcome

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
            for note in group.take_notes():
                self.display.note(note)
            if progress is not None:
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
        self.launcher.release(group.cell)
        has_failed = diagnosis.status == "failed"
        errors = (Fault.PROCESS_ERROR, Fault.COMMON_ERROR, Fault.DIVERGED)
        if has_failed and self.signals and diagnosis.fault not in errors:
            diagnosis = Diagnosis(status="stopped")  # the signal to the runner has ended some of the workers as well
        elif has_failed:
            self._write_failed_result(group, str(diagnosis.error), diagnosis.fault)
        outcome = Outcome(
            cell=group.cell,
            status=diagnosis.status,
            error=diagnosis.error,
            metrics=diagnosis.metrics,
            seconds=group.elapsed_s,
        )
        self.display.on_end(outcome)
        return outcome

    def _write_failed_result(self, group: WorkerGroup, reason: str, fault: str) -> None:
        """Write the result of a failure; only the runner has the reports of all processes."""
        folder = RunFolder.of(self.results, group.cell.id)
        with contextlib.suppress(OSError):  # a full disk may be the reason of the failure
            step = read_last_step(folder.journal)
            cell = json.loads(json.dumps(group.cell.to_dict(self.experiment)))
            result = build_failed_result(cell, reason, fault=fault, step=step, total_s=group.elapsed_s)
            folder.write_result(result)

    def _stop_all(self) -> list[Outcome]:
        """Ask the cells to save and end, and wait until they have; a second signal ends the wait."""
        self.display.note("stopping: saving checkpoints (again: stop now, from the last checkpoint)")
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
        first_until = self.signals[0][1] + (SAME_SIGNAL_S if self.launcher.max_jobs else 0.0)
        return any(received_at > first_until for _, received_at in self.signals[1:])
