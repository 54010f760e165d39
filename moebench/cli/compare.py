"""`moebench compare`: which arm is better, by how much, with what confidence."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moebench.cli.options import (
    DEFAULT_RESULTS,
    Json,
    Plugins,
    Results,
    Size,
    add_size,
    check_plot,
    complete_experiment_or_router,
)
from moebench.cli.output import print_report
from moebench.errors import UsageError
from moebench.experiment.files import find_experiment, list_experiments

if TYPE_CHECKING:
    from moebench.experiment.grid import Experiment


class SplitName(StrEnum):
    """Splits of the data that runs are evaluated on when they are trained."""

    TEST = "test"
    VALIDATION = "validation"


Split = Annotated[SplitName, typer.Option(help="What to compare on: choose settings on validation, report on test.")]
AllowMismatch = Annotated[
    bool,
    typer.Option(
        "--allow-mismatch", help="Give arms of unequal cost a verdict, and show arms of other data; all of them marked."
    ),
]

Margin = Annotated[
    float | None,
    typer.Option(
        help="Arms are equivalent below this share of the baseline's mean; else `margin` of the experiment, 0.01.",
        show_default=False,
    ),
]


def compare(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="EXPERIMENT | ROUTER...  [KEY=VALUE]...",
            help="An experiment, or routers to compare with the dense model.",
            autocompletion=complete_experiment_or_router,
        ),
    ],
    task: Annotated[str, typer.Option(help="Task of a comparison of routers.")] = "language",
    size: Size = None,
    results: Results = DEFAULT_RESULTS,
    plugin: Plugins = None,
    allow_mismatch: AllowMismatch = False,
    split: Split = SplitName.TEST,
    margin: Margin = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Write loss curves and differences to this file (PNG, PDF, SVG).")
    ] = None,
    jobs: Annotated[int, typer.Option(min=0, help="Cells at a time, where routers must be trained first.")] = 0,
    json: Json = False,
) -> None:
    """Compare the arms of an experiment: quality with intervals, load balance, throughput, cost.

    Seeds are paired, differences to the baseline have a 95 % t interval and a p value corrected for many
    comparisons (Holm). Arms whose executed FLOPs differ by more than 2 % get no verdict. Works on a grid that is
    still running. Given routers instead of an experiment, trains what is missing first.
    """
    from moebench.analysis.compare.experiment import compare_experiment, draw_experiment
    from moebench.analysis.compare.report import build_report
    from moebench.experiment.grid import expand, expand_routers
    from moebench.schema import check_margin

    overrides = add_size([name for name in names if "=" in name], size)
    subjects = [name for name in names if "=" not in name]
    check_plot(plot)
    if margin is not None:
        check_margin(margin, "--margin")
    if is_experiment(subjects):
        grid = expand(find_experiment(subjects[0]), overrides, plugin or (), finished_in=results)
    else:
        grid = expand_routers(subjects, task, overrides, plugin or ())
        train_missing(grid, results, jobs)
    comparison = compare_experiment(grid, results, allow_mismatch=allow_mismatch, split=split.value, margin=margin)
    if plot:
        draw_experiment(grid, results, plot, comparison)
    print_report(build_report(comparison), json=json, markdown=markdown)


def is_experiment(subjects: list[str]) -> bool:
    """Return whether the subject is an experiment rather than routers; raise UsageError for a mixture."""
    experiments = [name for name in subjects if name.endswith((".yaml", ".yml")) or "/" in name]
    experiments += [name for name in subjects if name in list_experiments()]
    if not subjects or (experiments and len(subjects) > 1):
        raise UsageError(f"compare: give one experiment, or routers only; got {', '.join(subjects) or 'neither'}")
    return bool(experiments)


def train_missing(grid: "Experiment", results: Path, jobs: int) -> None:
    """Train the cells that are not done; exit if interrupted."""
    from moebench.analysis.figures import Figures
    from moebench.cli.output import make_console
    from moebench.experiment.phases import run_phases
    from moebench.experiment.run_setup import RunOptions, RunSetup
    from moebench.launch.launcher import LocalLauncher

    setup = RunSetup(
        results=results,
        options=RunOptions(jobs=jobs),
        launcher=LocalLauncher(),
        console=make_console(stderr=True),
        figures=Figures(),
    )
    report = run_phases(grid, setup)
    if report.interrupted:
        raise typer.Exit(128 + report.interrupted)
