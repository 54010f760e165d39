"""`moebench run`: train every cell of an experiment that is not done."""

from collections.abc import Callable
from functools import partial
import sys
from collections.abc import Callable
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

    from moebench.experiment.launch import OwnLaunch, given_processes
    from moebench.experiment.runner import RunOptions

    options = RunOptions(jobs=jobs, tracker=tracker, reshard=reshard)
    console = Console(stderr=True)

    def train(launch: "Launch") -> int:
        return _run(experiment, overrides, results, plugin, options, console, launch, json=json)

    given = given_processes()
    code = train(OwnLaunch()) if given is None else _join(given, train)
    if code:
        raise typer.Exit(code)


def _join(given: "Given", train: Callable[["Launch"], int]) -> int:
    """Train over the processes that there are, as the first of them or as one that follows; return the exit code."""
    from moebench.experiment.joining import follow, leading
    from moebench.experiment.wire import AbandonedError

    if given.place.rank > 0:
        return follow(given)
    try:
        with leading(given) as launch:
            launch.exit_code = train(launch)
            return launch.exit_code
    except AbandonedError as error:
        print(f"error: {error}", file=sys.stderr)
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
    grid = expand(experiment_file(experiment), overrides or (), plugins or ())
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
