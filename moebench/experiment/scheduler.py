"""Runs cells, each in a process of its own: a crash stays there, the others go on, and a stop leaves all resumable."""

import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

from moebench.experiment.failure import disk_reason, failed_result
from moebench.experiment.grid import Cell
from moebench.training.run_folder import RunFolder, write_json

STOP_GRACE_S = 60.0
"""How long a worker may take to reach the end of its step and save, after the first Ctrl-C."""


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

    def started(self, cell: Cell) -> None:
        """A cell has got its process."""

    def progress(self, cell: Cell, message: dict[str, Any]) -> None:
        """A cell has finished a step: step, loss, tokens_per_s."""

    def ended(self, outcome: Outcome) -> None:
        """A cell has ended."""

    def note(self, text: str) -> None:
        """Something else worth a line."""


@dataclass
class _Worker:
    cell: Cell
    process: BaseProcess
    pipe: Connection
    started: float
    end: dict[str, Any] | None = None


class Interrupted(Exception):  # noqa: N818 - not an error: the user's wish
    """The runner was asked to stop; `signal_number` says how, `outcomes` what had ended."""

    def __init__(self, signal_number: int, outcomes: Sequence[Outcome]) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number
        self.outcomes = outcomes


class Scheduler:
    """Runs cells with at most `jobs` processes at a time.

    The processes are forked from a server that has torch and lightning loaded, so that only the first waits for
    the imports.
    """

    def __init__(self, results: Path, experiment: str, jobs: int, display: Display) -> None:
        self.results = results
        self.experiment = experiment
        self.jobs = jobs
        self.display = display
        self.context = get_context("forkserver")
        self.context.set_forkserver_preload(["moebench.experiment.worker"])
        self.workers: list[_Worker] = []
        self.signals: list[int] = []

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
        with self._signals_noted():
            self._start_server()
            try:
                while (waiting and not self.signals) or self.workers:
                    for outcome in (*self._fill(waiting), *self._gather()):
                        outcomes.append(outcome)
                        on_end(outcome)
                    on_tick()
                    if self.signals:
                        outcomes += self._stop_all()
                        break
            finally:
                self._kill_all()
        if self.signals:
            raise Interrupted(self.signals[0], outcomes)
        return outcomes

    def _start_server(self) -> None:
        """Start the process that the workers are forked from, deaf to Ctrl-C from its first moment on.

        Ctrl-C reaches the whole group, and would otherwise interrupt its imports with a traceback.
        """
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a program inherits what is ignored
        try:
            forkserver.ensure_running()
        finally:
            signal.signal(signal.SIGINT, before)

    def _fill(self, waiting: list[Cell]) -> Iterator[Outcome]:
        """Start cells until every place is taken; yield the end of those that could not even be described on disk."""
        while waiting and not self.signals and len(self.workers) < self.jobs:
            cell = waiting.pop(0)
            self.display.started(cell)
            try:
                self._start(cell)
            except OSError as error:
                outcome = Outcome(cell=cell, status="failed", error=disk_reason(error))
                self.display.ended(outcome)
                yield outcome

    def _start(self, cell: Cell) -> None:
        folder = RunFolder.of(self.results, cell.id)
        write_json(folder.cell, cell.to_dict(self.experiment))
        ours, theirs = self.context.Pipe()
        process = self.context.Process(
            target=_enter, args=(str(folder.path), str(self.results), theirs), name=f"moebench {cell.id}", daemon=True
        )
        process.start()
        theirs.close()
        self.workers.append(_Worker(cell, process, ours, time.monotonic()))

    def _gather(self, timeout: float = 0.2) -> Iterator[Outcome]:
        """Read what the workers say, and let go of those that have ended."""
        ready = wait([worker.pipe for worker in self.workers if not worker.pipe.closed], timeout)
        ended = []
        for worker in self.workers:
            if worker.pipe in ready:
                self._read(worker)
            if not worker.process.is_alive():
                self._read(worker)
                ended.append(worker)
        for worker in ended:
            self.workers.remove(worker)
            yield self._conclude(worker)

    def _read(self, worker: _Worker) -> None:
        with contextlib.suppress(EOFError, OSError):
            while worker.pipe.poll():
                message = worker.pipe.recv()
                if message.pop("kind") == "progress":
                    self.display.progress(worker.cell, message)
                else:
                    worker.end = message
            return
        worker.process.join(timeout=10)  # the pipe is gone: so will the process be

    def _conclude(self, worker: _Worker) -> Outcome:
        worker.process.join()
        worker.pipe.close()
        end = worker.end or self._died(worker)
        outcome = Outcome(cell=worker.cell, seconds=time.monotonic() - worker.started, **end)
        self.display.ended(outcome)
        return outcome

    def _died(self, worker: _Worker) -> dict[str, Any]:
        """A worker without a last word was killed from outside: write the result that it could not."""
        code = worker.process.exitcode or 0
        if self.signals:
            return {"status": "stopped", "error": None}
        cause = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        reason = f"the process was {cause}{hint}" if code < 0 else f"the process {cause}"
        folder = RunFolder.of(self.results, worker.cell.id)
        cell = json.loads(json.dumps(worker.cell.to_dict(self.experiment)))
        with contextlib.suppress(OSError):  # a full disk, perhaps the very reason
            write_json(folder.result, failed_result(cell, reason).to_dict())
        return {"status": "failed", "error": reason}

    def _stop_all(self) -> list[Outcome]:
        """Ask the workers to save and end; a second signal ends the wait."""
        self.display.note("stopping: saving checkpoints (once more: stop now, from the last checkpoint)")
        for worker in self.workers:
            with contextlib.suppress(OSError):
                worker.pipe.send("stop")
        deadline = time.monotonic() + STOP_GRACE_S
        outcomes: list[Outcome] = []
        while self.workers and len(self.signals) < 2 and time.monotonic() < deadline:
            outcomes += self._gather()
        return outcomes

    def _kill_all(self) -> None:
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.process.join(timeout=5)
        self.workers.clear()

    @contextlib.contextmanager
    def _signals_noted(self) -> Iterator[None]:
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, lambda got, frame: self.signals.append(got)) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _enter(path: str, results: str, pipe: Connection) -> None:
    """Import the worker in its own process: the runner stays light."""
    from moebench.experiment.worker import run_cell

    run_cell(path, results, pipe)
