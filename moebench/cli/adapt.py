"""`moebench adapt`: continue from a finished run on one domain of its data, or on other data."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moebench.cli.options import DEFAULT_RESULTS, Json, Overrides, Plugins, Results, print_json
from moebench.cli.run import IgnoreMemory, Jobs, Retries, TrackerUri
from moebench.cli.run_summary import choose_exit_code, describe_failure
from moebench.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from moebench.experiment.grid import Experiment
    from moebench.experiment.run_setup import RunOptions
    from moebench.experiment.runner import RunReport


class TrainableName(StrEnum):
    """Parameters that are updated."""

    ALL = "all"
    EXPERTS = "experts"
    ROUTERS = "routers"
    SHARED = "shared"
    NEW_EXPERTS = "new_experts"


Run = Annotated[str, typer.Argument(metavar="RUN", help="The id of a finished run, or how it begins.")]
To = Annotated[
    str,
    typer.Option(
        "--to", metavar="DOMAIN|DATA", help="A domain of the run's data, or a text file, folder or prepared folder."
    ),
]
Trainable = Annotated[
    TrainableName, typer.Option(help="Parameters that are updated; shared: all but routed experts and routers.")
]
Examples = Annotated[
    int | None, typer.Option(metavar="N", help="Windows of the target that are trained on (task.train_windows).")
]
Steps = Annotated[int | None, typer.Option(metavar="N", help="Updates. Default: a fifth of those of the run.")]
Rates = Annotated[
    str | None,
    typer.Option(
        "--learning-rate",
        metavar="R[,R...]",
        help="Several are tried in the same way, and one is chosen on validation.",
    ),
]
ExpertDropout = Annotated[
    float | None, typer.Option(min=0, max=1, metavar="P", help="Dropout inside experts (layout.expert_dropout).")
]
NoBalance = Annotated[bool, typer.Option("--no-balance-loss", help="Turn the auxiliary losses of the router off.")]


def adapt(
    run: Run,
    to: To,
    overrides: Overrides = None,
    trainable: Trainable = TrainableName.ALL,
    examples: Examples = None,
    steps: Steps = None,
    learning_rate: Rates = None,
    expert_dropout: ExpertDropout = None,
    no_balance_loss: NoBalance = False,
    results: Results = DEFAULT_RESULTS,
    plugin: Plugins = None,
    jobs: Jobs = 0,
    tracker: TrackerUri = None,
    retries: Retries = 0,
    ignore_memory: IgnoreMemory = False,
    json: Json = False,
) -> None:
    """Fine-tune a finished run on a domain or on other data, and show what it gains there and loses elsewhere.

    It writes an ordinary run: the same command continues where it was interrupted, and shows the result of one that is
    done. Settings are those of the run, with --steps, --learning-rate and KEY=VALUE. Several runs, seeds and settings
    at once are an experiment with stages.
    """
    from moebench.experiment.adaptation import AdaptOptions, build_adaptation
    from moebench.experiment.run_setup import RunOptions
    from moebench.registry import load_plugin
    from moebench.runs.find_run import find_run

    options = AdaptOptions(
        to=to,
        trainable=trainable.value,
        examples=examples,
        steps=steps,
        learning_rates=_read_rates(learning_rate),
        expert_dropout=expert_dropout,
        has_balance_loss=not no_balance_loss,
    )
    options.check()
    loaded = [load_plugin(each) for each in plugin or ()]
    folder = find_run(results, run)
    experiment = build_adaptation(folder, options, overrides or (), loaded, results)
    run_options = RunOptions(jobs=jobs, tracker=tracker, retries=retries, ignore_memory=ignore_memory)
    if code := _train(experiment, results, run_options, json=json):
        raise typer.Exit(code)


def _train(experiment: "Experiment", results: Path, options: "RunOptions", *, json: bool) -> int:
    """Train what is missing, show it, and return the exit code."""
    from moebench.analysis.figures import Figures
    from moebench.experiment.phases import run_phases
    from moebench.experiment.run_setup import RunSetup
    from moebench.launch.launcher import LocalLauncher
    from moebench.reporting.streams import open_stderr_console

    console = open_stderr_console()
    setup = RunSetup(results=results, options=options, launcher=LocalLauncher(), console=console, figures=Figures())
    report = run_phases(experiment, setup)
    _show(report, results, console, json=json)
    return choose_exit_code(report)


def _read_rates(text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError as error:
        raise UsageError(f"--learning-rate: '{text}' was given; allowed: numbers with commas between them") from error


def _show(report: "RunReport", results: Path, console: "Console", *, json: bool) -> None:
    """Print what was trained, and its gain and forgetting."""
    from moebench.analysis.transfer.experiment import measure_transfer
    from moebench.analysis.transfer.report import LEGEND, build_transfer_tables
    from moebench.cli.output import print_report
    from moebench.reporting.report import Report
    from moebench.tracking.tracker import format_tracker_problem

    transfer = measure_transfer(report.experiment, results) if report.experiment.cells else None
    if json:
        print_json(report.to_dict() | {"transfer": transfer.to_dict() if transfer else None})
        return
    lines = [describe_failure(outcome) for outcome in report.failed]
    lines += report.tuning.list_lines() if report.tuning else []
    lines += [f"warning: {problem}" for problem in report.problems]
    lines += [format_tracker_problem(report.tracker_problem)] if report.tracker_problem else []
    lines += ["interrupted; the same command continues from there"] if report.interrupted else []
    ids = ", ".join(cell.id for cell in report.experiment.cells) if report.num_done else ""
    lines += [f"run {ids} of experiment {report.experiment.name}"] if ids else []
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if transfer:
        print_report(
            Report(tables=build_transfer_tables(transfer), notes=LEGEND, values=None), json=False, markdown=False
        )
