"""Runs cells, each in processes of its own: a crash stays there, the others go on, and a stop leaves all resumable."""

import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

from moebench.launch.diagnosis import COMMON, OWN, Verdict
from moebench.launch.failure import disk_reason, failed_result
from moebench.launch.launcher import Launch
from moebench.launch.local_worker import signals_noted, start_server
from moebench.launch.worker_group import Team
from moebench.runs.cell import Cell
from moebench.runs.folder import RunFolder, write_json
from moebench.runs.journal import read_journal
from moebench.runs.result import Fault

STOP_GRACE_S = 60.0
"""How long a cell may take to reach the end of its step and save, after the first Ctrl-C."""
SAME_WISH_S = 3.0
"""A terminal, torchrun and SLURM may each pass on the same Ctrl-C."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one cell ended in this call: done, failed, stopped, found (done by another runner) or busy (with it)."""

    cell: Cell
    status: str
    error: str | None
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


class Display(Protocol):
    """What shows the progress of a grid."""

    def on_start(self, cell: Cell) -> None:
        """A cell has got its processes."""

    def on_progress(self, cell: Cell, message: dict[str, Any]) -> None:
        """A cell has finished a step: step, loss, tokens_per_s."""

    def on_end(self, outcome: Outcome) -> None:
        """A cell has ended."""

    def note(self, text: str) -> None:
        """Something else worth a line."""


class Interrupted(Exception):  # noqa: N818 - not an error: the user's wish
    """The runner was asked to stop; `signal_number` says how, `outcomes` what had ended."""

    def __init__(self, signal_number: int, outcomes: Sequence[Outcome]) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number
        self.outcomes = outcomes


class Scheduler:
    """Runs at most `jobs` cells at a time; `launch` starts their processes."""

    def __init__(self, results: Path, experiment: str, jobs: int, display: Display, launch: Launch) -> None:
        self.results = results
        self.experiment = experiment
        self.jobs = min(jobs, launch.most_jobs) if launch.most_jobs else jobs
        self.display = display
        self.launch = launch
        self.teams: list[Team] = []
        self.signals: list[tuple[int, float]] = []
        """Number and time of each."""

    def run(
        self,
        cells: Sequence[Cell],
        on_tick: Callable[[], None] = lambda: None,
        on_end: Callable[[Outcome], None] = lambda outcome: None,
    ) -> list[Outcome]:
        """Train the cells in order and return how each ended; raise Interrupted after Ctrl-C or SIGTERM.

        `on_tick` is called a few times a second, `on_end` after each cell.
        """
        waiting = list(cells)
        outcomes: list[Outcome] = []
        with signals_noted(self._note_signal):
            start_server()
            try:
                while (waiting and not self.signals) or self.teams:
                    for outcome in (*self._fill(waiting), *self._gather()):
                        outcomes.append(outcome)
                        on_end(outcome)
                    on_tick()
                    if self.signals:
                        outcomes += self._stop_all()
                        break
            finally:
                for team in self.teams:
                    team.kill()
                    self.launch.release(team.cell)
        if self.signals:
            raise Interrupted(self.signals[0][0], outcomes)
        return outcomes

    def _note_signal(self, number: int) -> None:
        self.signals.append((number, time.monotonic()))

    def _fill(self, waiting: list[Cell]) -> Iterator[Outcome]:
        """Start cells until every place is taken; yield the end of those that could not even be described on disk."""
        while waiting and not self.signals and len(self.teams) < self.jobs:
            cell = waiting.pop(0)
            self.display.started(cell)
            try:
                write_json(RunFolder.of(self.results, cell.id).cell, cell.to_dict(self.experiment))
                members = self.launch.members(cell, self.results)
                self.teams.append(Team(cell, members, self.launch.patience_s))
            except OSError as error:
                self.launch.release(cell)
                outcome = Outcome(cell=cell, status="failed", error=disk_reason(error))
                self.display.ended(outcome)
                yield outcome

    def _gather(self, timeout: float = 0.2) -> Iterator[Outcome]:
        """Hear what the cells say, and let go of those that have ended."""
        waitables = [thing for team in self.teams for thing in team.waitables]
        if waitables:
            wait(waitables, timeout)
        else:
            time.sleep(timeout)
        over = []
        for team in self.teams:
            news = team.look()
            if news is not None:
                self.display.progress(team.cell, news)
            if team.is_over:
                over.append(team)
        wish = self.launch.stop_wish()
        if wish is not None and not self.signals:
            self._note_signal(wish)
        for team in over:
            self.teams.remove(team)
            yield self._conclude(team)

    def _conclude(self, team: Team) -> Outcome:
        verdict = team.close()
        self.launch.release(team.cell)
        if verdict.status == "failed" and self.signals and verdict.fault not in (OWN, COMMON, Fault.DIVERGED):
            verdict = Verdict(status="stopped")  # what asked us to end has ended some of the processes as well
        if verdict.status == "failed":
            self._write_failed(team, str(verdict.error), verdict.fault)
        outcome = Outcome(
            cell=team.cell,
            status=verdict.status,
            error=verdict.error,
            metrics=verdict.metrics,
            seconds=team.seconds,
        )
        self.display.ended(outcome)
        return outcome

    def _write_failed(self, team: Team, reason: str, fault: str) -> None:
        """Write the result of a failure: only here all processes of the cell were heard."""
        folder = RunFolder.of(self.results, team.cell.id)
        cell = json.loads(json.dumps(team.cell.to_dict(self.experiment)))
        with contextlib.suppress(OSError):  # a full disk, perhaps the very reason
            step = last_step(folder.journal)
            failed = failed_result(cell, reason, fault=fault, step=step, total_s=team.seconds)
            write_json(folder.result, failed.to_dict())

    def _stop_all(self) -> list[Outcome]:
        """Ask the cells to save and end; a second signal ends the wait."""
        self.display.note("stopping: saving checkpoints (once more: stop now, from the last checkpoint)")
        for team in self.teams:
            team.stop()
        deadline = time.monotonic() + STOP_GRACE_S
        outcomes: list[Outcome] = []
        while self.teams and not self._is_pressed and time.monotonic() < deadline:
            outcomes += self._gather()
        return outcomes

    @property
    def _is_pressed(self) -> bool:
        """Whether the wish to stop came twice; among processes started by others the same one arrives by many ways."""
        first = self.signals[0][1] + (SAME_WISH_S if self.launch.most_jobs else 0.0)
        return any(at > first for _, at in self.signals[1:])


def last_step(journal: Path) -> int:
    """Return the last step that a journal knows of, 0 for none."""
    points, _ = read_journal(journal)
    return max((point.step for point in points), default=0)
