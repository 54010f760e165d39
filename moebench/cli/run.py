"""`moebench run`: train every cell of an experiment that is not done."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moebench.cli.options import (
    DEFAULT_RESULTS,
    ExperimentName,
    Json,
    Overrides,
    Plugins,
    Results,
    print_json,
)
from moebench.errors import UsageError
from moebench.experiment.files import find_experiment

if TYPE_CHECKING:
    from rich.console import Console

    from moebench.experiment.runner import RunOptions, RunReport
    from moebench.launch.cluster_environment import ClusterEnvironment
    from moebench.launch.launcher import Launcher

EXIT_FAILED, EXIT_TRACKER = 1, 3

IgnoreMemory = Annotated[
    bool, typer.Option("--ignore-memory", help="Train cells that need more memory than there is, by the estimate.")
]


def run(
    experiment: ExperimentName,
    overrides: Overrides = None,
    results: Results = DEFAULT_RESULTS,
    plugin: Plugins = None,
    jobs: Annotated[int, typer.Option(min=0, help="Cells at a time; 0: cores / train.threads, or one a GPU.")] = 0,
    tracker: Annotated[
        str | None,
        typer.Option(envvar="MOEBENCH_TRACKER", help="MLflow URI; 'none' for no tracker. Default: SQLite in results."),
    ] = None,
    reshard: Annotated[
        bool,
        typer.Option("--reshard", help="Start new cells from the checkpoints of the same cells on another mesh."),
    ] = False,
    foreground: Annotated[
        str | None,
        typer.Option(metavar="CELL", help="Train one cell in this process, for a debugger: ARM, ARM/SEED or its id."),
    ] = None,
    ignore_memory: IgnoreMemory = False,
    json: Json = False,
) -> None:
    """Train every cell that is not done and resume those half done.

    Each cell runs in its own processes: when one fails, the others continue. Press Ctrl-C once to stop with
    everything saved; the same command continues from there. Started by torchrun or SLURM, it trains over the processes
    that these started.

    With --foreground a breakpoint() in a plug-in stops at a prompt, and a failure shows its traceback; no tracker.

    Exit codes: 0 all done, 1 some cells failed, 2 mistake in the command or configuration, 3 the tracker missed
    something (nothing is lost: `moebench sync`), 130 and 143 interrupted.
    """
    from rich.console import Console

    from moebench.experiment.runner import RunOptions
    from moebench.launch.cluster_environment import detect_cluster
    from moebench.launch.launcher import LocalLauncher

    console = Console(stderr=True)
    cluster = detect_cluster()
    if foreground is not None:
        _check_foreground({"--json": json, "--jobs": jobs > 0, "--reshard": reshard}, cluster)
        code = _run_one_cell(experiment, overrides, plugin, foreground, results, console, ignore_memory=ignore_memory)
    else:
        options = RunOptions(jobs=jobs, tracker=tracker, reshard=reshard, ignore_memory=ignore_memory)
        run_grid = partial(_run_grid, experiment, overrides, plugin, results, options, console, json=json)
        code = run_grid(LocalLauncher()) if cluster is None else _run_in_cluster(cluster, run_grid, console)
    if code:
        raise typer.Exit(code)


def _check_foreground(options: dict[str, bool], cluster: "ClusterEnvironment | None") -> None:
    """Raise UsageError for options that do not apply to one cell in this process."""
    for option, is_given in options.items():
        if is_given:
            raise UsageError(f"{option}: not with --foreground, which trains one cell in this process")
    if cluster is not None:
        raise UsageError(
            "--foreground: trains one cell in this process; torchrun or SLURM started"
            f" {cluster.process_info.world_size} (allowed: 1)"
        )


def _run_one_cell(
    experiment: str,
    overrides: list[str] | None,
    plugins: list[str] | None,
    cell_name: str,
    results: Path,
    console: "Console",
    *,
    ignore_memory: bool,
) -> int:
    """Train one cell in this process and return the exit code."""
    from moebench.analysis.figures import Figures
    from moebench.experiment.foreground import run_foreground, select_cell
    from moebench.experiment.grid import expand

    grid = expand(find_experiment(experiment), overrides or (), plugins or ())
    cell = select_cell(grid.cells, cell_name)
    return run_foreground(grid, cell, results, console=console, figures=Figures(), ignore_memory=ignore_memory)


def _run_in_cluster(cluster: "ClusterEnvironment", run_grid: "Callable[[Launcher], int]", console: "Console") -> int:
    """Run the grid as rank 0, or participate as another rank; return the exit code."""
    from moebench.launch.cluster import coordinate, participate
    from moebench.launch.rendezvous import RendezvousError

    if cluster.process_info.rank > 0:
        return participate(cluster)
    try:
        with coordinate(cluster) as launcher:
            launcher.exit_code = run_grid(launcher)
            return launcher.exit_code
    except RendezvousError as error:
        console.print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        return EXIT_FAILED


def _run_grid(
    experiment: str,
    overrides: list[str] | None,
    plugins: list[str] | None,
    results: Path,
    options: "RunOptions",
    console: "Console",
    launcher: "Launcher",
    *,
    json: bool,
) -> int:
    """Run the grid, print a summary and return the exit code."""
    from moebench.analysis.figures import Figures
    from moebench.experiment.grid import expand
    from moebench.experiment.runner import run_experiment
    from moebench.tracking.mlflow_store import check_uri

    if options.tracker not in (None, "none"):
        check_uri(options.tracker)
    grid = expand(find_experiment(experiment), overrides or (), plugins or ())
    report = run_experiment(grid, results, options, launcher=launcher, console=console, figures=Figures())
    if json:
        print_json(report.to_dict())
    else:
        _print_summary(report, experiment, console)
    return _exit_code(report)


def _exit_code(report: "RunReport") -> int:
    if report.interrupted:
        return 128 + report.interrupted
    if report.failed:
        return EXIT_FAILED
    return EXIT_TRACKER if report.tracker_problem else 0


def _print_summary(report: "RunReport", experiment: str, console: "Console") -> None:
    lines = [f"{report.num_done} of {report.num_cells} cells done, {len(report.trained)} of them trained now"]
    lines += [
        f"failed: {outcome.cell.arm} seed {outcome.cell.seed}: {outcome.error} (log: {report.log_path(outcome)})"
        for outcome in report.failed
    ]
    if report.tracker_problem:
        lines.append(f"tracker: {report.tracker_problem}")
    if report.interrupted:
        lines.append(f"interrupted; go on with: moebench run {experiment}")
    else:
        lines.append(f"next: moebench compare {experiment}  |  moebench ui")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
