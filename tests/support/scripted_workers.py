"""Workers that follow a script, so that the scheduler's decisions are tested without processes."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moebench.launch.diagnosis import ExitReport
from moebench.launch.local_worker import Worker
from moebench.launch.scheduler import Outcome
from moebench.runs.cell import Cell
from moebench.runs.result import Fault

DONE = {"status": "done", "metrics": {"bits_per_byte": 1.0}}
FAILED = {"status": "failed", "error": "ValueError: no", "fault": Fault.PROCESS_ERROR}
DIVERGED = {"status": "failed", "error": "loss is nan at step 3", "fault": Fault.DIVERGED}
SILENT: dict[str, Any] = {}
"""Reports nothing until it is killed or asked to stop."""


class ScriptedWorker(Worker):
    """Takes one step at the first poll and reports at the second one what the script says."""

    def __init__(self, report: dict[str, Any], obeys: bool = True) -> None:
        self.rank = 0
        self.has_ended = self.is_saving = False
        self.last_message_at = time.monotonic()
        self.report = report
        self.obeys = obeys
        self.num_polls = 0
        self.is_killed = False
        self.final: dict[str, Any] = {}
        self.ready, writer = os.pipe()
        os.close(writer)  # always readable, so that the scheduler does not sleep

    @property
    def waitables(self) -> list[Any]:
        return [self.ready] if self.report else []

    def poll(self) -> dict[str, Any] | None:
        self.num_polls += 1
        if self.num_polls == 1:
            self.last_message_at = time.monotonic()
            return {"step": 3, "loss": 2.0, "tokens_per_s": 1.0}
        if self.report:
            self.final, self.has_ended = self.report, True
        return None

    def request_stop(self) -> None:
        if self.obeys:
            self.report = {"status": "stopped"}

    def kill(self) -> None:
        if not self.is_killed:
            os.close(self.ready)
        self.is_killed = self.has_ended = True

    def exit_report(self) -> ExitReport:
        return ExitReport(rank=0, step=3, **self.final)

    def describe_halt(self) -> str:
        return ""


@dataclass
class ScriptedLauncher:
    """Starts a scripted worker: each cell has its list of reports, one for each start; the last one is repeated."""

    reports: dict[str, list[dict[str, Any]]]
    """Arm -> reports; an arm without any is done."""
    obeys: bool = True
    max_jobs: int = 0
    message_delay_s: float = 0.0
    started: list[str] = field(default_factory=list)
    workers: list[ScriptedWorker] = field(default_factory=list)

    def check(self, cells: Sequence[Cell]) -> None:
        pass

    def start(self, cell: Cell, results: Path) -> list[Worker]:
        self.started.append(cell.arm)
        reports = self.reports.get(cell.arm, [DONE])
        report = reports[min(self.started.count(cell.arm), len(reports)) - 1]
        if isinstance(report, Exception):
            raise report
        self.workers.append(ScriptedWorker(report, self.obeys))
        return [self.workers[-1]]

    def release(self, cell: Cell) -> None:
        pass

    def stop_signal(self) -> int | None:
        return None


class RecordingDisplay:
    """Keeps what it is asked to show; raises in the methods that it is told to."""

    def __init__(self, *faulty: str) -> None:
        self.faulty = faulty
        self.ended: list[Outcome] = []
        self.notes: list[str] = []

    def on_start(self, cell: Cell) -> None:
        self._raise_in("on_start")

    def on_progress(self, cell: Cell, message: dict[str, Any]) -> None:
        self._raise_in("on_progress")

    def on_end(self, outcome: Outcome) -> None:
        self.ended.append(outcome)
        self._raise_in("on_end")

    def note(self, text: str) -> None:
        self.notes.append(text)
        self._raise_in("note")

    def _raise_in(self, name: str) -> None:
        if name in self.faulty:
            raise SystemExit(1) if name == "on_end" else RuntimeError(f"{name} is broken")
