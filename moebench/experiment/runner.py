"""One call of `run`: the cells that are missing, their display, the tracker beside them, the figures at the end."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from moebench.cores import available_cores
from moebench.experiment.display import LineDisplay, LiveDisplay
from moebench.experiment.grid import Experiment
from moebench.experiment.plan import state_of
from moebench.experiment.reshard import reshard
from moebench.experiment.store import open_results, record_experiment, require_room, unfinished
from moebench.launch.devices import uses_gpu, visible_devices
from moebench.launch.launcher import Launch
from moebench.launch.scheduler import Interrupted, Outcome, Scheduler
from moebench.runs.cell import Cell
from moebench.runs.folder import RunFolder
from moebench.tasks.task import TASKS
from moebench.tracking.mlflow_store import default_uri
from moebench.tracking.tracker import Tracker
from moebench.training.model import prepare_task


class Figures(Protocol):
    """Draws what the tracker shows beside the numbers."""

    def draw_run_figures(self, folder: RunFolder, title: str) -> None:
        """Draw the expert loads of one finished run into its folder."""

    def draw_experiment_figures(self, experiment: Experiment, results: Path) -> None:
        """Draw the curves of all arms into the results folder."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a grid is run; none of it changes a result."""

    jobs: int = 0
    """Cells at a time, 0: as many as fit this machine."""
    tracker: str | None = None
    """MLflow URI, "none" for no tracker, None for the one in the results folder."""
    reshard: bool = False
    """Whether new cells begin from the checkpoints of the same cells on another mesh."""


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """What one call of `run` did."""

    experiment: Experiment
    results: Path
    num_done: int
    """Cells of the grid that are done now."""
    outcomes: Sequence[Outcome]
    """Cells that were run in this call."""
    tracker_problem: str | None
    interrupted: int
    """Number of the signal that ended it, 0 for none."""

    @property
    def num_cells(self) -> int:
        """Cells of the grid."""
        return len(self.experiment.cells)

    @property
    def trained(self) -> list[Outcome]:
        """Cells finished in this call."""
        return [outcome for outcome in self.outcomes if outcome.status == "done"]

    @property
    def failed(self) -> list[Outcome]:
        """Cells that failed, or are held by another process."""
        return [outcome for outcome in self.outcomes if outcome.status in ("failed", "busy")]

    def log_of(self, outcome: Outcome) -> Path:
        """Return the log of a cell."""
        return RunFolder.of(self.results, outcome.cell.id).log

    def to_dict(self) -> dict[str, Any]:
        """Return the report, ready for JSON."""
        return {
            "experiment": self.experiment.name,
            "cells": [
                {"id": cell.id, "arm": cell.arm, "seed": cell.seed, "state": state_of(self.results, cell)}
                for cell in self.experiment.cells
            ],
            "trained": [outcome.cell.id for outcome in self.trained],
            "failed": [
                {"id": outcome.cell.id, "error": outcome.error, "log": str(self.log_of(outcome))}
                for outcome in self.failed
            ],
            "tracker": self.tracker_problem,
            "interrupted": self.interrupted,
        }


def run_experiment(
    experiment: Experiment, results: Path, options: RunOptions, *, launch: Launch, console: Console, figures: Figures
) -> RunReport:
    """Train the cells that are not done; raise UsageError before anything is trained when that cannot work."""
    launch.check(experiment.cells)
    open_results(results)
    todo = unfinished(results, experiment)
    for note in experiment.notes:
        _note(console, note)
    require_room(results, experiment, todo)
    record_experiment(results, experiment)
    for config in {cell.data_digest: cell.config for cell in todo}.values():
        prepare_task(config, results)  # once, here: the workers find it in the cache
    for note in reshard(results, todo) if options.reshard else ():
        _note(console, note)
    uri = options.tracker or default_uri(results)
    tracking = None if uri == "none" else Tracker(results, uri, experiment.name)
    if tracking:
        tracking.start()
    work = _Work(experiment, results, todo, launch, console, figures, tracking)
    outcomes, interrupted = work.train(options.jobs or default_jobs(todo))
    if todo and not interrupted:
        figures.draw_experiment_figures(experiment, results)
    status = tracking.stop() if tracking else None
    return RunReport(
        experiment=experiment,
        results=results,
        num_done=sum(state_of(results, cell) == "done" for cell in experiment.cells),
        outcomes=outcomes,
        tracker_problem=status.reason if status and not status.ok else None,
        interrupted=interrupted,
    )


@dataclass(frozen=True)
class _Work:
    experiment: Experiment
    results: Path
    todo: list[Cell]
    launch: Launch
    console: Console
    figures: Figures
    tracking: Tracker | None

    def train(self, jobs: int) -> tuple[list[Outcome], int]:
        """Return how the cells ended and the signal that cut it short (0: none)."""
        if not self.todo:
            return [], 0
        metric = TASKS.get(self.todo[0].config.task.name).facts.metric
        warned: list[str] = []
        with (LiveDisplay if self.console.is_terminal else LineDisplay)(self.console, self.todo, metric) as display:

            def look_at_tracker() -> None:
                problem = self.tracking.poll() if self.tracking else None
                if problem and not warned:
                    warned.append(problem)
                    display.note(f"tracker: {problem}; training goes on")

            scheduler = Scheduler(self.results, self.experiment.name, jobs, display, self.launch)
            try:
                return scheduler.run(self.todo, on_tick=look_at_tracker, on_end=self._draw), 0
            except Interrupted as interrupted:
                return list(interrupted.outcomes), interrupted.signal_number

    def _draw(self, outcome: Outcome) -> None:
        cell = outcome.cell
        self.figures.draw_run_figures(RunFolder.of(self.results, cell.id), f"{cell.arm}, seed {cell.seed}")


def _note(console: Console, text: str) -> None:
    console.print(f"note: {text}", highlight=False, markup=False, soft_wrap=True)


def default_jobs(cells: Sequence[Cell]) -> int:
    """Return how many of the cells fit this machine at a time: GPUs by processes, or cores by processes and threads."""
    on_gpu = {cell.config.parallel.world_size for cell in cells if uses_gpu(cell.config.train)}
    threads = {
        cell.config.parallel.world_size * cell.config.train.threads for cell in cells if not uses_gpu(cell.config.train)
    }
    fit = [len(visible_devices()) // max(on_gpu)] if on_gpu else []
    fit += [available_cores() // max(threads)] if threads else []
    return max(1, min(fit, default=1))
