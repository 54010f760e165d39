"""`run --foreground`: train one cell in this process, where a debugger can stop it."""

import bdb
import contextlib
import logging
import signal
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console
from torch.distributed.checkpoint.api import CheckpointException

from moebench.errors import UsageError, suggest
from moebench.experiment.data_need import require_epochs
from moebench.experiment.display import LineDisplay, cell_title
from moebench.experiment.grid import Experiment
from moebench.experiment.memory import require_memory
from moebench.experiment.model_costs import ModelCosts
from moebench.experiment.parent_overlap import require_no_overlap
from moebench.experiment.parents import require_parents
from moebench.experiment.run_setup import Figures
from moebench.experiment.runner import mark_trivial_baselines, print_note
from moebench.experiment.stage_runs import build_stage_experiments, describe_missing_parent
from moebench.experiment.store import open_results, record_experiment, require_disk_space
from moebench.experiment.tuning import build_tuning_experiment, select_tuned_cells
from moebench.interrupts import handle_signals
from moebench.launch.containment import Containment
from moebench.launch.devices import require_devices
from moebench.launch.error_report import classify_error, describe_cell_error
from moebench.launch.failure import build_failed_result
from moebench.launch.folder_training import TrainingReports, train_from_folder
from moebench.launch.scheduler import Outcome
from moebench.launch.worker_process import list_shown_metrics
from moebench.parallel.process_info import SINGLE_PROCESS
from moebench.parallel.safe_reader import UnsafeCheckpointError
from moebench.plugin_errors import ContractError, keep_traceback
from moebench.runs.attempts import Attempt, record_attempt
from moebench.runs.cell import Cell
from moebench.runs.folder import RunFolder
from moebench.runs.journal import read_last_step
from moebench.tasks.task import TASKS

EXIT_BUSY = 1


def select_phase_cell(experiment: Experiment, name: str, results: Path) -> tuple[Experiment, Cell]:
    """Return the cell that is named, and what it is a cell of: the experiment, its tuning, or an earlier stage.

    The arms of an earlier stage are called `STAGE: ARM`. Raises UsageError for another name, for an arm that has not
    chosen its settings yet, and for a cell that starts from a run which is not done.
    """
    settled = select_tuned_cells(experiment, results)
    tuning = [build_tuning_experiment(experiment)] if experiment.tuning else []
    phases = [settled, *tuning, *build_stage_experiments(experiment)]
    waiting = [arm for arm in experiment.arms if arm not in settled.arms]
    if tuning and name.partition("/")[0] in waiting:
        raise UsageError(
            f"--foreground: '{name}' has not chosen its settings yet; allowed: tuning runs, as"
            f" '{tuning[0].cells[0].arm}'"
        )
    cells = [
        replace(cell, arm=f"{cell.stage}: {cell.arm}") if phase.stage_of else cell
        for phase in phases
        for cell in phase.cells
    ]
    chosen = select_cell(cells, name)
    missing = describe_missing_parent(results, chosen)
    if missing:
        raise UsageError(f"--foreground: '{name}' cannot start: {missing}")
    return next((phase, cell) for phase in phases for cell in phase.cells if cell.id == chosen.id)


def select_cell(cells: Sequence[Cell], name: str) -> Cell:
    """Return the cell named `ARM` (its first seed), `ARM/SEED` or by a prefix of its id.

    Raises UsageError for any other name.
    """
    named: dict[str, Cell] = {}
    for cell in cells:
        named.setdefault(cell.arm, cell)
        named[f"{cell.arm}/{cell.seed}"] = cell
    if name in named:
        return named[name]
    by_id = {cell.id: cell for cell in cells if name and cell.id.startswith(name)}
    if len(by_id) == 1:
        return next(iter(by_id.values()))
    if by_id:
        raise UsageError(f"--foreground: '{name}' matches several ids: {', '.join(by_id)}")
    arms = ", ".join(dict.fromkeys(cell.arm for cell in cells))
    seeds = ", ".join(dict.fromkeys(str(cell.seed) for cell in cells))
    raise UsageError(
        f"--foreground: there is no cell '{name}'.{suggest(name, named)} Allowed: ARM, ARM/SEED or the start of an id;"
        f" arms: {arms}; seeds: {seeds}"
    )


def run_foreground(
    experiment: Experiment,
    cell: Cell,
    results: Path,
    *,
    console: Console,
    figures: Figures,
    ignore_memory: bool = False,
) -> int:
    """Train one cell in this process and return the exit code.

    Lock, journal, checkpoints and result are in the run folder as usual; output goes to the terminal, and nothing to
    the tracker. An error in training is raised again after the failed result is written, for the debugger.
    """
    world_size = cell.config.parallel.world_size
    if world_size > 1:
        raise UsageError(
            f"--foreground: {cell_title(cell)} needs {world_size} processes; add parallel.data=1 parallel.expert=1 to"
            " train the same model in one"
        )
    require_devices(cell.config.train, 1)
    open_results(results)
    for note in (*experiment.notes, *_check_cell(cell, results, ignore_memory=ignore_memory)):
        print_note(console, note)
    record_experiment(results, experiment)
    metric = TASKS.get(cell.config.task.name).facts.metric
    metric = f"validation/{metric}" if experiment.tuning_of else metric
    folder = RunFolder.of(results, cell.id)
    folder.write_cell(cell.to_dict(experiment.name))
    try:
        with FileLock(folder.lock, timeout=0):
            if folder.state() == "done":
                print_note(console, f"{cell_title(cell)} is done; --results FOLDER trains it again in another folder")
                _show_trivial_baselines(experiment, results, console)
                return 0
            code = _train(cell, folder, results, console, metric)
    except Timeout:
        console.print(f"error: another process is training {cell_title(cell)}", highlight=False, markup=False)
        return EXIT_BUSY
    figures.draw_run_figures(folder, f"{cell.arm}, seed {cell.seed}")
    if code == 0:
        _show_trivial_baselines(experiment, results, console)
    return code


def _check_cell(cell: Cell, results: Path, *, ignore_memory: bool) -> list[str]:
    """Raise UsageError for a cell that cannot be trained; return notes on its parents."""
    costs = ModelCosts(results)
    if not ignore_memory:
        require_memory([cell], costs)
    require_disk_space(results, [cell], costs)
    require_epochs([cell], costs)
    require_parents([cell], costs)
    return require_no_overlap([cell], costs)


def _show_trivial_baselines(experiment: Experiment, results: Path, console: Console) -> None:
    """Record the trivial baselines as `run` does, and print a warning where the experiment is below them."""
    if not experiment.is_reported:
        return
    containment = Containment(lambda line: print_note(console, line))
    mark = mark_trivial_baselines(experiment, results, console, containment)
    if mark:
        console.print(f"warning: {mark}", highlight=False, markup=False, soft_wrap=True)


def _train(cell: Cell, folder: RunFolder, results: Path, console: Console, metric: str) -> int:
    started_at = time.monotonic()
    display = LineDisplay(console, [cell], metric)
    signals: list[int] = []

    def request_stop(number: int) -> None:
        if signals:
            raise KeyboardInterrupt
        signals.append(number)
        display.note("stopping: saving a checkpoint (again: stop now, from the last checkpoint)")

    _silence_lightning()
    display.on_start(cell)
    try:
        with handle_signals(request_stop):
            result = train_from_folder(
                folder,
                results,
                SINGLE_PROCESS,
                TrainingReports(
                    progress=partial(display.on_progress, cell),
                    should_stop=lambda: bool(signals),
                    note=partial(print_note, console),
                ),
            )
    except bdb.BdbQuit:  # the user left the debugger: the cell can be resumed
        return 128 + signal.SIGINT
    except (Exception, SystemExit, CheckpointException) as error:
        if signals and isinstance(error, SystemExit):
            return 128 + signals[0]
        _record_failure(folder, error, time.monotonic() - started_at)
        is_rule = isinstance(error, ContractError) and error.__cause__ is None  # no line of code has raised it
        if is_rule or isinstance(error, UnsafeCheckpointError):  # of a file, not of the code that is debugged: one line
            display.note(f"failed: {cell_title(cell)}: {error}")
            return 1
        if isinstance(error, UsageError | SystemExit):  # the command line would not show their tracebacks
            raise RuntimeError(f"{cell_title(cell)} failed") from error
        keep_traceback(error)
        raise
    outcome = Outcome(
        cell=cell,
        status="done" if result else "stopped",
        error=None,
        metrics=list_shown_metrics(result) if result else {},
        seconds=time.monotonic() - started_at,
    )
    _record_attempt(folder, outcome.status, outcome.seconds)
    display.on_end(outcome)
    return 0 if result else 128 + signals[0]


def _silence_lightning() -> None:
    """Keep lightning's hints, which a worker writes to the log of its run, out of the terminal."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", category=FutureWarning)


def _record_attempt(folder: RunFolder, status: str, seconds: float, error: str | None = None, fault: str = "") -> None:
    with contextlib.suppress(OSError, UsageError):
        attempt = Attempt(
            started_at=time.time() - seconds,
            seconds=seconds,
            status=status,
            error=error,
            fault=fault,
            step=read_last_step(folder.journal),
        )
        record_attempt(folder.attempts, attempt)


def _record_failure(folder: RunFolder, error: BaseException, total_s: float) -> None:
    """Write the result and the attempt of a cell that has failed."""
    reason, fault = describe_cell_error(error, folder), classify_error(error)
    with contextlib.suppress(OSError, UsageError):  # a full disk or a lost folder may be the reason of the failure
        result = build_failed_result(
            folder.read_cell(),
            reason,
            fault=fault,
            step=read_last_step(folder.journal),
            total_s=total_s,
        )
        folder.write_result(result)
    _record_attempt(folder, "failed", total_s, reason, fault)
