"""`moebench run`: train every cell of an experiment that is not done."""

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
    from moebench.experiment.runner import RunReport

EXIT_FAILED, EXIT_TRACKER = 1, 3


def run(
    experiment: ExperimentName,
    overrides: Overrides = None,
    results: Results = DEFAULT_RESULTS,
    plugin: Plugins = None,
    jobs: Annotated[int, typer.Option(min=0, help="Cells at a time; 0: cores / train.threads, or 1 on a GPU.")] = 0,
    tracker: Annotated[
        str | None,
        typer.Option(envvar="MOEBENCH_TRACKER", help="MLflow URI; 'none' for no tracker. Default: SQLite in results."),
    ] = None,
    json: Json = False,
) -> None:
    """Train every cell that is not done and resume those half done.

    Each cell runs in a process of its own: when one fails, the others go on. Press Ctrl-C once to stop with
    everything saved; the same command goes on from there.

    Exit codes: 0 all done, 1 some cells failed, 2 mistake in the command or configuration, 3 the tracker missed
    something (nothing is lost: `moebench sync`), 130 and 143 interrupted.
    """
    from rich.console import Console

    from moebench.experiment.grid import expand
    from moebench.experiment.runner import run_experiment
    from moebench.tracking.mlflow_store import check_uri

    if tracker not in (None, "none"):
        check_uri(tracker)
    grid = expand(experiment_file(experiment), overrides or (), plugin or ())
    console = Console(stderr=True)
    report = run_experiment(grid, results, jobs=jobs, tracker=tracker, console=console, figures=_figures())
    if json:
        import json as json_module

        print(json_module.dumps(report.to_dict(), indent=1))
    else:
        _say(report, experiment, console)
    code = _exit_code(report)
    if code:
        raise typer.Exit(code)


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
