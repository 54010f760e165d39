"""`moebench run`: train the missing cells with a display and a tracker, then draw the figures."""

import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from moebench.cores import available_cores
from moebench.errors import UsageError
from moebench.experiment.data_need import require_epochs
from moebench.experiment.display import open_display
from moebench.experiment.grid import Experiment
from moebench.experiment.live_tracking import start_tracker, stop_tracker
from moebench.experiment.memory import count_fitting_cells, require_memory
from moebench.experiment.model_costs import ModelCosts
from moebench.experiment.parent_overlap import require_no_overlap
from moebench.experiment.parents import require_parents
from moebench.experiment.plan import cell_state
from moebench.experiment.reshard import reshard
from moebench.experiment.run_setup import RunOptions, RunSetup
from moebench.experiment.stage_runs import StageReport, split_orphans, write_failures
from moebench.experiment.store import DAMAGED, open_results, record_experiment, require_disk_space, split_unfinished
from moebench.experiment.trivial_baselines import summarise_baselines
from moebench.experiment.tuning_report import TuningReport
from moebench.launch.containment import Containment
from moebench.launch.devices import uses_gpu, visible_devices
from moebench.launch.scheduler import Interrupted, Outcome, SchedulePolicy, Scheduler
from moebench.runs.cell import Cell
from moebench.runs.folder import RunFolder
from moebench.tasks.task import TASKS
from moebench.tracking.address import NO_TRACKER, check_uri, format_sync
from moebench.tracking.tracker import Tracker, format_tracker_problem
from moebench.training.model import prepare_task


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """Summary of one call of `run`."""

    experiment: Experiment
    results: Path
    num_done: int
    """Cells of the grid that are done after the call."""
    outcomes: Sequence[Outcome]
    """Cells that were run in this call."""
    tracker_problem: str | None
    interrupted: int
    """Number of the signal that ended the call, 0 for none."""
    problems: Sequence[str] = ()
    """What could not be shown, drawn, tracked or tidied up, one line each; no result depends on it."""
    tuning: TuningReport | None = None
    """Of an experiment with tuning: its tuning runs."""
    stages: StageReport | None = None
    """Of an experiment with stages: the runs of all but the last."""
    below_trivial: str = ""
    """The mark of an experiment whose baseline arm does not beat trivial baselines; else empty."""

    @property
    def num_cells(self) -> int:
        """Cells of the grid."""
        return self.tuning.num_final_cells if self.tuning else len(self.experiment.cells)

    @property
    def trained(self) -> list[Outcome]:
        """Cells finished in this call."""
        return [outcome for outcome in self.outcomes if outcome.status == "done"]

    @property
    def failed(self) -> list[Outcome]:
        """Cells, also of earlier stages, that failed or that another process trains; not trials that diverged."""
        earlier = [*(self.stages.failed if self.stages else ()), *(self.tuning.failed if self.tuning else ())]
        return [*earlier, *(outcome for outcome in self.outcomes if outcome.status in ("failed", "busy"))]

    def log_path(self, outcome: Outcome) -> Path:
        """Return the log of a cell."""
        return RunFolder.of(self.results, outcome.cell.id).log

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        return {
            "experiment": self.experiment.name,
            "cells": [
                {"id": cell.id, "arm": cell.arm, "seed": cell.seed, "state": describe_state(self.results, cell)}
                for cell in self.experiment.cells
            ],
            "trained": [outcome.cell.id for outcome in self.trained],
            "attempts": {outcome.cell.id: outcome.attempts for outcome in self.outcomes},
            "failed": [
                {"id": outcome.cell.id, "error": outcome.error, "log": str(self.log_path(outcome))}
                for outcome in self.failed
            ],
            **({"tuning": self.tuning.to_dict()} if self.tuning else {}),
            **({"stages": self.stages.to_dict()} if self.stages else {}),
            "tracker": self.tracker_problem,
            "interrupted": self.interrupted,
            "problems": list(self.problems),
            "below_trivial_baselines_text": self.below_trivial or None,
        }


def run_experiment(experiment: Experiment, setup: RunSetup) -> RunReport:
    """Train the cells that are not done; raise UsageError before training if a cell cannot be trained."""
    results, options, console = setup.results, setup.options, setup.console
    if options.tracker not in (None, NO_TRACKER):
        check_uri(options.tracker)
    setup.launcher.check(experiment.cells)
    open_results(results)
    cells, damaged = split_unfinished(results, experiment)
    cells, orphans = split_orphans(results, cells)
    for note in experiment.notes:
        print_note(console, note)
    costs = ModelCosts(results)
    notes = _require_resources(results, cells, costs, options)
    for note in notes if experiment.is_reported else ():
        print_note(console, note)
    record_experiment(results, experiment)
    write_failures(results, experiment.name, orphans)
    for config in {cell.data_digest: cell.config for cell in cells}.values():
        prepare_task(config, results)  # once, so that the workers read it from the cache
    for note in reshard(results, cells) if options.reshard else ():
        print_note(console, note)
    containment = Containment(lambda line: print_note(console, f"{line}; training continues"))
    has_tracker, sync = options.tracker != NO_TRACKER, format_sync(results, options.tracker)
    tracker = start_tracker(results, options.tracker, experiment.name, containment) if has_tracker else None
    grid_run = _GridRun(experiment, setup, cells, tracker, containment)
    try:
        jobs = options.jobs or min(choose_num_jobs(cells), count_fitting_cells(cells, costs))
        outcomes, interrupted = grid_run.train(replace(options, jobs=jobs))
        below_trivial = ""
        if interrupted is None and experiment.is_reported:
            below_trivial, interrupted = grid_run.summarise()
    except BaseException:
        if tracker:
            tracker.kill()
        raise
    print_line = partial(print_note, console)
    tracker_problem = stop_tracker(tracker, print_line, interrupted, containment, sync) if has_tracker else None
    return RunReport(
        experiment=experiment,
        results=results,
        num_done=sum(describe_state(results, cell) == "done" for cell in experiment.cells),
        outcomes=[*damaged, *orphans, *outcomes],
        tracker_problem=tracker_problem,
        interrupted=interrupted.signal_number if interrupted else 0,
        problems=containment.problems,
        below_trivial=below_trivial,
    )


def _require_resources(results: Path, cells: list[Cell], costs: ModelCosts, options: RunOptions) -> list[str]:
    """Raise UsageError for cells that need more memory, disk or training data than there is, or another parent.

    Returns notes on their parents.
    """
    if not options.ignore_memory:
        require_memory(cells, costs)
    require_disk_space(results, cells, costs)
    require_epochs(cells, costs)
    require_parents(cells, costs)
    return require_no_overlap(cells, costs)


def describe_state(results: Path, cell: Cell) -> str:
    """Return the state of a cell for a report, which a damaged file must not prevent."""
    try:
        return cell_state(results, cell)
    except UsageError:
        return DAMAGED


@dataclass(frozen=True)
class _GridRun:
    experiment: Experiment
    setup: RunSetup
    cells: list[Cell]
    tracker: Tracker | None
    containment: Containment

    def train(self, options: RunOptions) -> tuple[list[Outcome], Interrupted | None]:
        """Return the outcomes, and what interrupted the training, or None."""
        if not self.cells:
            return [], None
        metric = TASKS.get(self.cells[0].config.task.name).facts.metric
        metric = f"validation/{metric}" if self.experiment.tuning_of else metric
        warnings: list[str] = []
        with open_display(self.setup.console, self.cells, metric, self.containment) as display:

            def poll_tracker() -> None:
                problem = self.tracker.poll() if self.tracker else None
                if problem and not warnings:
                    warnings.append(problem)
                    display.note(f"{format_tracker_problem(problem)}; training continues")

            policy = SchedulePolicy(
                jobs=options.jobs,
                retries=options.retries,
                stops_at_failure=options.fail_fast,
            )
            setup, name = self.setup, self.experiment.name
            scheduler = Scheduler(setup.results, name, policy, display, setup.launcher, self.containment)
            try:
                return scheduler.run(self.cells, on_tick=poll_tracker, on_end=self._draw), None
            except Interrupted as interrupted:
                return list(interrupted.outcomes), interrupted

    def summarise(self) -> tuple[str, Interrupted | None]:
        """Record the trivial baselines, draw the curves.

        Returns the mark of an experiment below the baselines, and what interrupted this, or None.
        """
        try:
            return self._summarise(), None
        except KeyboardInterrupt:
            return "", Interrupted(signal.SIGINT, (), time.monotonic(), is_repeated=False)

    def _summarise(self) -> str:
        setup = self.setup
        mark = mark_trivial_baselines(self.experiment, setup.results, setup.console, self.containment)
        if self.cells:
            with self.containment.contain("figure of the curves"):
                setup.figures.draw_experiment_figures(self.experiment, setup.results)
        return mark

    def _draw(self, outcome: Outcome) -> None:
        cell = outcome.cell
        with self.containment.contain(f"figures of {cell.arm}, seed {cell.seed}"):
            self.setup.figures.draw_run_figures(
                RunFolder.of(self.setup.results, cell.id), f"{cell.arm}, seed {cell.seed}"
            )


def mark_trivial_baselines(experiment: Experiment, results: Path, console: Console, containment: Containment) -> str:
    """Record the trivial baselines of an experiment; return the mark of one that is below them, else an empty text."""
    mark = ""
    with containment.contain("trivial baselines"):
        mark, notes = summarise_baselines(
            experiment,
            results,
            on_compute=lambda: print_note(console, "computing the trivial baselines of the data, once"),
        )
        for note in notes:
            print_note(console, note)
    return mark


def print_note(console: Console, text: str) -> None:
    """Print a line that the user should read before training starts."""
    console.print(f"note: {text}", highlight=False, markup=False, soft_wrap=True)


def choose_num_jobs(cells: Sequence[Cell]) -> int:
    """Return how many of the cells this machine can run at a time.

    With GPUs: GPUs / processes of a cell; without: cores / (processes · threads). The largest cell decides.
    """
    gpu_processes = {cell.config.parallel.world_size for cell in cells if uses_gpu(cell.config.train)}
    cpu_threads = {
        cell.config.parallel.world_size * cell.config.train.threads for cell in cells if not uses_gpu(cell.config.train)
    }
    limits = [len(visible_devices()) // max(gpu_processes)] if gpu_processes else []
    limits += [available_cores() // max(cpu_threads)] if cpu_threads else []
    return max(1, min(limits, default=1))
