"""One call of `run`: the cells that are missing, their display, the tracker beside them, the figures at the end."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console

from moebench.experiment.display import LineDisplay, LiveDisplay
from moebench.experiment.grid import Cell, Experiment
from moebench.experiment.plan import state_of
from moebench.experiment.scheduler import Interrupted, Outcome, Scheduler
from moebench.experiment.store import open_results, record_experiment, require_room, unfinished
from moebench.tasks.task import TASKS
from moebench.tracking.mlflow_store import default_uri
from moebench.tracking.tracker import Tracker
from moebench.training.model import prepare_task
from moebench.training.run_folder import RunFolder


class Figures(Protocol):
    """Draws what the tracker shows beside the numbers."""

    def of_run(self, folder: RunFolder, title: str) -> None:
        """Draw the expert loads of one finished run into its folder."""

    def of_experiment(self, experiment: Experiment, results: Path) -> None:
        """Draw the curves of all arms into the results folder."""


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
    experiment: Experiment, results: Path, *, jobs: int, tracker: str | None, console: Console, figures: Figures
) -> RunReport:
    """Train the cells that are not done; raise UsageError before anything is trained when that cannot work."""
    open_results(results)
    todo = unfinished(results, experiment)
    for note in experiment.notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    require_room(results, experiment, todo)
    record_experiment(results, experiment)
    for config in {cell.data_digest: cell.config for cell in todo}.values():
        prepare_task(config, results)  # once, here: the workers find it in the cache
    tracking = None if tracker == "none" else Tracker(results, tracker or default_uri(results), experiment.name)
    if tracking:
        tracking.start()
    outcomes, interrupted = _train(experiment, results, todo, jobs, console, figures, tracking)
    if todo and not interrupted:
        figures.of_experiment(experiment, results)
    status = tracking.stop() if tracking else None
    return RunReport(
        experiment=experiment,
        results=results,
        num_done=sum(state_of(results, cell) == "done" for cell in experiment.cells),
        outcomes=outcomes,
        tracker_problem=status.reason if status and not status.ok else None,
        interrupted=interrupted,
    )


def _train(
    experiment: Experiment,
    results: Path,
    todo: list[Cell],
    jobs: int,
    console: Console,
    figures: Figures,
    tracking: Tracker | None,
) -> tuple[list[Outcome], int]:
    """Return how the cells ended and the signal that cut it short (0: none)."""
    if not todo:
        return [], 0
    metric = TASKS.get(todo[0].config.task.name).facts.metric
    warned: list[str] = []
    with (LiveDisplay if console.is_terminal else LineDisplay)(console, todo, metric) as display:

        def look_at_tracker() -> None:
            problem = tracking.poll() if tracking else None
            if problem and not warned:
                warned.append(problem)
                display.note(f"tracker: {problem}; training goes on")

        scheduler = Scheduler(results, experiment.name, jobs or default_jobs(todo), display)
        try:
            outcomes = scheduler.run(
                todo,
                on_tick=look_at_tracker,
                on_end=lambda outcome: figures.of_run(RunFolder.of(results, outcome.cell.id), _title(outcome.cell)),
            )
        except Interrupted as interrupted:
            return list(interrupted.outcomes), interrupted.signal_number
    return outcomes, 0


def default_jobs(cells: Sequence[Cell]) -> int:
    """Return how many cells fit this machine: cores by threads, or one where a GPU does the work."""
    configs = [cell.config.train for cell in cells]
    if torch.cuda.is_available() and any(config.device != "cpu" for config in configs):
        return 1
    return max(1, (os.cpu_count() or 1) // max(config.threads for config in configs))


def _title(cell: Cell) -> str:
    return f"{cell.arm}, seed {cell.seed}"
