"""`moebench compare`: which arm is better, by how much, with what confidence."""

from collections.abc import Sequence
from dataclasses import dataclass
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
from moebench.cli.subjects import are_experiments
from moebench.errors import UsageError
from moebench.experiment.files import find_experiment

if TYPE_CHECKING:
    from moebench.analysis.compare.values import Split
    from moebench.experiment.grid import Experiment
    from moebench.reporting.report import Report


class SplitName(StrEnum):
    """Splits of the data that runs are evaluated on when they are trained."""

    TEST = "test"
    VALIDATION = "validation"


EffectiveCompute = Annotated[
    bool,
    typer.Option(
        "--effective-compute",
        help="What each arm is worth in compute of the baseline, over experiments of several sizes (--size S0,S1,S2).",
    ),
]


class AxisName(StrEnum):
    """What curves are drawn over."""

    STEPS = "steps"
    TOKENS = "tokens"
    FLOPS = "flops"
    SECONDS = "seconds"


AxisOption = Annotated[
    AxisName | None, typer.Option("--axis", help="Add a table over this axis, and draw the curves of --plot over it.")
]
SplitOption = Annotated[
    SplitName, typer.Option(help="What to compare on: choose settings on validation, report on test.")
]
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
            metavar="EXPERIMENT... | ROUTER...  [KEY=VALUE]...",
            help="An experiment, several to pool, or routers to compare with the dense model.",
            autocompletion=complete_experiment_or_router,
        ),
    ],
    task: Annotated[str, typer.Option(help="Task of a comparison of routers.")] = "language",
    size: Size = None,
    results: Results = DEFAULT_RESULTS,
    plugin: Plugins = None,
    allow_mismatch: AllowMismatch = False,
    split: SplitOption = SplitName.TEST,
    margin: Margin = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Write loss curves and differences to this file (PNG, PDF, SVG).")
    ] = None,
    jobs: Annotated[int, typer.Option(min=0, help="Cells at a time, where routers must be trained first.")] = 0,
    axis: AxisOption = None,
    effective_compute: EffectiveCompute = False,
    json: Json = False,
) -> None:
    """Compare the arms of an experiment: quality with intervals, load balance, throughput, cost.

    Seeds are paired, differences to the baseline have a 95 % t interval and a p value corrected for many
    comparisons (Holm). Arms whose executed FLOPs differ by more than 2 % get no verdict. Works on a grid that is
    still running. Several experiments that share arms are pooled. Given routers instead of an experiment, trains what
    is missing first.
    """
    choice = Choice(split.value, allow_mismatch, effective_compute, margin, axis, plot)
    check_choice(choice)
    overrides = [name for name in names if "=" in name]
    subjects = [name for name in names if "=" not in name]
    if are_experiments(subjects):
        sizes = size.split(",") if size else [None]
        grids = expand_several(subjects, overrides, sizes, plugin or (), results)
        is_one = len(grids) == 1 and not effective_compute
        report = compare_one(grids[0], results, choice) if is_one else compare_several(grids, results, choice)
    else:
        if effective_compute:
            raise UsageError(f"--effective-compute: needs experiments of several sizes, got {', '.join(subjects)}")
        from moebench.experiment.grid import expand_routers

        grid = expand_routers(subjects, task, add_size(overrides, size), plugin or ())
        train_missing(grid, results, jobs)
        report = compare_one(grid, results, choice)
    print_report(report, json=json, markdown=markdown)


@dataclass(frozen=True)
class Choice:
    """What to compare by, and what to add."""

    split: "Split"
    allow_mismatch: bool
    effective_compute: bool = False
    margin: float | None = None
    axis: AxisName | None = None
    plot: Path | None = None


def check_choice(choice: Choice) -> None:
    """Raise UsageError for a file or a margin that is none, before anything is read."""
    check_plot(choice.plot)
    if choice.margin is not None:
        from moebench.schema import check_margin

        check_margin(choice.margin, "--margin")


def compare_one(grid: "Experiment", results: Path, choice: Choice) -> "Report":
    """Compare the arms of one experiment, and draw the figure."""
    from moebench.analysis.compare.experiment import compare_experiment, draw_experiment
    from moebench.analysis.compare.report import build_report
    from moebench.analysis.fairness.along_axis import AXIS_LABELS, read_along_axis
    from moebench.analysis.fairness.experiment import measure_experiment
    from moebench.analysis.fairness.measure import compare_on_axes
    from moebench.analysis.fairness.report import add_fairness

    comparison = compare_experiment(
        grid, results, allow_mismatch=choice.allow_mismatch, split=choice.split, margin=choice.margin
    )
    arms = measure_experiment(grid, results, comparison)
    along = read_along_axis(arms, choice.axis.value) if choice.axis else None
    if choice.plot:
        x_axis = (AXIS_LABELS[along.axis], along.map_steps()) if along else None
        draw_experiment(grid, results, choice.plot, comparison, x_axis)
    fairness = compare_on_axes(arms, ignore_conditions=choice.allow_mismatch)
    return add_fairness(build_report(comparison), fairness, along)


def expand_several(
    subjects: Sequence[str],
    overrides: Sequence[str],
    sizes: Sequence[str | None],
    plugins: Sequence[str],
    results: Path,
) -> "list[Experiment]":
    """Return every experiment at every size."""
    from moebench.experiment.grid import expand

    return [
        expand(find_experiment(subject), add_size(overrides, size), plugins, finished_in=results)
        for subject in subjects
        for size in sizes
    ]


def compare_several(grids: "Sequence[Experiment]", results: Path, choice: Choice) -> "Report":
    """Pool experiments, or estimate effective compute over them; raise UsageError for options of one experiment."""
    if choice.plot or choice.axis:
        names = ", ".join(grid.name for grid in grids)
        raise UsageError(f"--{'plot' if choice.plot else 'axis'}: is for one experiment, got {names}")
    if choice.effective_compute:
        from moebench.analysis.pooled.effective_report import build_ladder_report
        from moebench.analysis.pooled.experiments import name_uniquely
        from moebench.analysis.pooled.ladder import read_ladder

        return build_ladder_report(read_ladder(name_uniquely(grids), results, choice.split))
    from moebench.analysis.pooled.experiments import pool_experiments
    from moebench.analysis.pooled.report import build_pooled_report

    pooled = pool_experiments(grids, results, allow_mismatch=choice.allow_mismatch, split=choice.split)
    return build_pooled_report(pooled)


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
