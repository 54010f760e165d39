"""`moebench run`: train every cell of an experiment that is not done."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moebench.cli.options import (
    DEFAULT_RESULTS,
    ExperimentName,
    Json,
    Overrides,
    Plugins,
    Results,
    experiment_file,
)

if TYPE_CHECKING:
    from rich.console import Console

    from moebench.experiment.runner import RunOptions, RunReport
    from moebench.launch.launcher import Given, Launch

EXIT_FAILED, EXIT_TRACKER = 1, 3


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
        typer.Option(
            "--reshard", help="Begin a new cell from the checkpoint of the same one on other processes, if it is there."
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Train every cell that is not done and resume those half done.

    Each cell runs in processes of its own: when one fails, the others go on. Press Ctrl-C once to stop with
    everything saved; the same command goes on from there. Started by torchrun or SLURM, it trains over the processes
    that are there.

    Exit codes: 0 all done, 1 some cells failed, 2 mistake in the command or configuration, 3 the tracker missed
    something (nothing is lost: `moebench sync`), 130 and 143 interrupted.
    """
    from rich.console import Console

    from moebench.experiment.runner import RunOptions
    from moebench.launch.launcher import LocalLauncher, given_processes

    options = RunOptions(jobs=jobs, tracker=tracker, reshard=reshard)
    console = Console(stderr=True)
    given = given_processes()
    work = partial(_run, experiment, overrides, results, plugin, options, console, json=json)
    code = work(LocalLauncher()) if given is None else _joined(given, work, console)
    if code:
        raise typer.Exit(code)


def _joined(given: "Given", work: "Callable[[Launch], int]", console: "Console") -> int:
    """Do the work as the first of the processes that are there, or follow the first; return the exit code."""
    from moebench.launch.cluster import follow, leading
    from moebench.launch.rendezvous import AbandonedError

    if given.process_info.rank > 0:
        return follow(given)
    try:
        with leading(given) as launch:
            launch.exit_code = work(launch)
            return launch.exit_code
    except AbandonedError as error:
        console.print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        return EXIT_FAILED


def _run(
    experiment: str,
    overrides: list[str] | None,
    results: Path,
    plugins: list[str] | None,
    options: "RunOptions",
    console: "Console",
    launch: "Launch",
    *,
    json: bool,
) -> int:
    """Run the grid, say what came of it, and return the exit code."""
    from moebench.experiment.grid import expand
    from moebench.experiment.runner import run_experiment
    from moebench.tracking.mlflow_store import check_uri

    if options.tracker not in (None, "none"):
        check_uri(options.tracker)
    grid = expand(find_experiment(experiment), overrides or (), plugins or ())
    report = run_experiment(grid, results, options, launch=launch, console=console, figures=_figures())
    if json:
        import json as json_module

        print(json_module.dumps(report.to_dict(), indent=1), flush=True)
    else:
        _say(report, experiment, console)
    return _exit_code(report)


def _figures() -> Any:
    from moebench.analysis.figures import Figures

    return Figures()


def _exit_code(report: "RunReport") -> int:
    if report.interrupted:
        return 128 + report.interrupted
    if report.failed:
        return EXIT_FAILED
    return EXIT_TRACKER if report.tracker_problem else 0


def _say(report: "RunReport", experiment: str, console: Any) -> None:
    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    say(f"{report.num_done} of {report.num_cells} cells done, {len(report.trained)} of them trained now")
    for outcome in report.failed:
        say(f"failed: {outcome.cell.arm} seed {outcome.cell.seed}: {outcome.error} (log: {report.log_of(outcome)})")
    if report.tracker_problem:
        say(f"tracker: {report.tracker_problem}")
    if report.interrupted:
        say(f"interrupted; go on with: moebench run {experiment}")
    else:
        say(f"next: moebench compare {experiment}  |  moebench ui")
