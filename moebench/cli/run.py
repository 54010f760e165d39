"""`moebench run`: train every cell of an experiment that is not done."""

from collections.abc import Callable
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moebench.cli.options import (
    DEFAULT_RESULTS,
    CommandArguments,
    ExperimentName,
    Json,
    Overrides,
    Plugins,
    Results,
    Size,
    add_size,
    print_json,
)
from moebench.cli.run_summary import EXIT_FAILED, choose_exit_code, print_summary
from moebench.errors import UsageError
from moebench.experiment.files import find_experiment
from moebench.printable import print_text

if TYPE_CHECKING:
    from rich.console import Console

    from moebench.analysis.seed_planning.sequential import DecisionReport
    from moebench.experiment.grid import Experiment
    from moebench.experiment.run_setup import RunOptions, RunSetup
    from moebench.experiment.runner import RunReport
    from moebench.launch.cluster_environment import ClusterEnvironment
    from moebench.launch.launcher import Launcher


class UntilName(StrEnum):
    """When a run that adds seeds ends."""

    DECIDED = "decided"


IgnoreMemory = Annotated[
    bool, typer.Option("--ignore-memory", help="Train cells even if their estimated memory is not available.")
]


Jobs = Annotated[int, typer.Option(min=0, help="Cells trained at a time; 0: cores / train.threads, or one per GPU.")]
TrackerUri = Annotated[
    str | None,
    typer.Option(envvar="MOEBENCH_TRACKER", help="MLflow URI; 'none' for no tracker. Default: SQLite in results."),
]
Retries = Annotated[
    int, typer.Option(min=0, max=100, metavar="N", help="Try a failed cell again N times, from its last checkpoint.")
]
FailFast = Annotated[bool, typer.Option("--fail-fast", help="Stop at the first cell that fails; the others are saved.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show the cells that would be trained, with their state; write nothing.")
]
Reshard = Annotated[
    bool, typer.Option("--reshard", help="Start new cells from the checkpoints of the same cells on another mesh.")
]
Until = Annotated[
    UntilName | None,
    typer.Option(
        help="After the planned seeds, train more seeds, up to --max-seeds, for undecided arms and the baseline."
        " If given from the first run on, the overall significance level is 5 %."
    ),
]
MaxSeeds = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="With --until decided: largest number of seeds of an arm.")
]
Foreground = Annotated[
    str | None,
    typer.Option(metavar="CELL", help="Train one cell in this process, for a debugger: ARM, ARM/SEED or its id."),
]


def run(
    experiment: ExperimentName,
    overrides: Overrides = None,
    size: Size = None,
    results: Results = DEFAULT_RESULTS,
    plugin: Plugins = None,
    jobs: Jobs = 0,
    tracker: TrackerUri = None,
    retries: Retries = 0,
    fail_fast: FailFast = False,
    dry_run: DryRun = False,
    reshard: Reshard = False,
    until: Until = None,
    max_seeds: MaxSeeds = None,
    foreground: Foreground = None,
    ignore_memory: IgnoreMemory = False,
    json: Json = False,
) -> None:
    """Train every cell that is not done; resume unfinished ones.

    Each cell runs in its own processes: when one fails, the others continue. Press Ctrl-C once to save and stop; the
    same command resumes. Under torchrun or SLURM, the processes that they started are used.

    With --foreground, breakpoint() in a plug-in opens the debugger, a failure shows its traceback, and nothing is sent
    to the tracker.

    Exit codes: 0 all done, 1 some cells failed, 2 error in the command or configuration, 3 the tracker did not receive
    everything (nothing is lost: `moebench sync`), 128 + the number of the signal that interrupted it (130: Ctrl-C).
    """
    from moebench.experiment.run_setup import RunOptions
    from moebench.launch.cluster_environment import detect_cluster
    from moebench.launch.launcher import LocalLauncher
    from moebench.reporting.streams import open_stderr_console

    console = open_stderr_console()
    overrides, cluster = add_size(overrides, size), detect_cluster()
    _check_until(until, max_seeds, dry_run=dry_run)
    if foreground is not None:
        others = {"--json": json, "--jobs": jobs, "--reshard": reshard, "--retries": retries, "--until": bool(until)}
        _check_foreground(others | {"--fail-fast": fail_fast, "--dry-run": dry_run}, cluster)
        code = _run_one_cell(experiment, overrides, plugin, foreground, results, console, ignore_memory=ignore_memory)
    elif dry_run:
        code = _show_actions(experiment, overrides, plugin, results, cluster, json)
    else:
        options = RunOptions(jobs, tracker, reshard, retries, fail_fast, ignore_memory)
        run_grid = partial(_run_grid, experiment, overrides, plugin, results, options, console, max_seeds, json=json)
        code = run_grid(LocalLauncher()) if cluster is None else _run_in_cluster(cluster, run_grid, console)
    if code:
        raise typer.Exit(code)


def _check_until(until: UntilName | None, max_seeds: int | None, *, dry_run: bool) -> None:
    """Raise UsageError for one of the two options without the other, and where nothing is trained."""
    if (until is None) != (max_seeds is None):
        missing, given = ("--max-seeds", "--until decided") if until else ("--until decided", "--max-seeds")
        raise UsageError(f"{given}: needs {missing} too (for example --until decided --max-seeds 8)")
    if until and dry_run:
        raise UsageError("--until: not with --dry-run, which does not know what will be undecided")


def _check_foreground(options: dict[str, int], cluster: "ClusterEnvironment | None") -> None:
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
    from moebench.experiment.foreground import run_foreground, select_phase_cell
    from moebench.experiment.grid import expand

    grid = expand(find_experiment(experiment), overrides or (), plugins or (), results=results)
    phase, cell = select_phase_cell(grid, cell_name, results)
    return run_foreground(phase, cell, results, console=console, figures=Figures(), ignore_memory=ignore_memory)


def _show_actions(
    experiment: str,
    overrides: list[str] | None,
    plugins: list[str] | None,
    results: Path,
    cluster: "ClusterEnvironment | None",
    json: bool,
) -> int:
    """Print what a run would do with each cell, on the first of several processes."""
    from moebench.cli.output import print_table
    from moebench.experiment.dry_run import list_actions, summarise_actions
    from moebench.experiment.grid import expand
    from moebench.launch.launcher import LocalLauncher

    if cluster is not None and cluster.process_info.rank > 0:
        return 0
    grid = expand(find_experiment(experiment), overrides or (), plugins or (), results=results)
    if cluster is None:  # under torchrun the run itself checks the mesh
        LocalLauncher().check(grid.cells)
    rows = list_actions(grid, results)
    if json:
        print_json({"experiment": grid.name, "cells": rows})
        return 0
    stage = ("stage",) if grid.stages else ()
    columns = ("cell", *stage, "arm", "seed", "state", "action", "from step", "reason")
    fields = ("id", *stage, "arm", "seed", "state", "action", "from_step", "error")
    lines = [tuple("" if row[field] is None else str(row[field]) for field in fields) for row in rows]
    print_table(columns, lines, right=("seed", "from step"), no_wrap=columns[:1])
    print_text(summarise_actions(rows))
    return 0


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
    max_seeds: int | None,
    launcher: "Launcher",
    *,
    json: bool,
) -> int:
    """Run the grid, print a summary and return the exit code."""
    from moebench.analysis.figures import Figures
    from moebench.experiment.grid import expand
    from moebench.experiment.run_setup import RunSetup

    grid = expand(find_experiment(experiment), overrides or (), plugins or (), results=results)
    arguments = CommandArguments(
        experiment=experiment, overrides=overrides or (), plugins=plugins or (), results=results
    )
    figures = Figures(command=arguments.format("run"))
    setup = RunSetup(results=results, options=options, launcher=launcher, console=console, figures=figures)
    report, decisions = _run_phases(grid, setup, max_seeds)
    if json:
        print_json(report.to_dict() | ({"until": decisions.to_dict()} if decisions else {}))
    else:
        lines = decisions.list_lines() if decisions else []
        given = ["--until", "decided", "--max-seeds", str(max_seeds)] if max_seeds else []
        print_summary(report, arguments, options, lines=lines, given=given, console=console)
    return choose_exit_code(report)


def _run_phases(
    grid: "Experiment", setup: "RunSetup", max_seeds: int | None
) -> "tuple[RunReport, DecisionReport | None]":
    """Run the seeds of the file, or until decisions; return the report, and that of decisions."""
    if max_seeds is None:
        from moebench.experiment.phases import run_phases

        return run_phases(grid, setup), None
    from moebench.analysis.seed_planning.sequential import run_until_decided

    decisions = run_until_decided(grid, setup, max_seeds)
    return decisions.run, decisions
