"""`moebench compare`: which arm is better, by how much, with what confidence."""

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moebench.cli.comparisons import (
    CompareOptions,
    check_compare_options,
    compare_experiments,
    compare_one,
    expand_all,
    require_one_size,
)
from moebench.cli.options import (
    DEFAULT_RESULTS,
    Json,
    Plugins,
    Results,
    add_size,
    complete_experiment_or_router,
)
from moebench.cli.output import print_report
from moebench.cli.subjects import are_experiments

if TYPE_CHECKING:
    from moebench.experiment.grid import Experiment


class SplitName(StrEnum):
    """Splits of the data that runs are evaluated on when they are trained."""

    TEST = "test"
    VALIDATION = "validation"


EffectiveCompute = Annotated[
    bool,
    typer.Option(
        "--effective-compute",
        help="How much compute of the baseline each arm is worth, over several sizes (--size S0 --size S1 --size S2).",
    ),
]


Sizes = Annotated[
    list[str] | None,
    typer.Option(
        "--size", help="Named size in place of the experiment's own (list sizes). Repeatable: several are pooled."
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
    SplitName, typer.Option(help="Split to compare on: choose settings on validation, report on test.")
]
AllowMismatch = Annotated[
    bool,
    typer.Option(
        "--allow-mismatch",
        help="Allow verdicts for arms of unequal cost and comparisons across data; such arms are marked.",
    ),
]

Details = Annotated[
    bool,
    typer.Option(
        "--details", help="Add p values, effect sizes, power, pairing and a legend (always part of --markdown, --json)."
    ),
]
Margin = Annotated[
    float | None,
    typer.Option(
        help="Margin of equivalence, as a share of the baseline's mean. Default: `margin` of the experiment (0.01).",
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
    task: Annotated[str, typer.Option(help="If routers are given: the task to compare them on.")] = "language",
    size: Sizes = None,
    results: Results = DEFAULT_RESULTS,
    plugin: Plugins = None,
    allow_mismatch: AllowMismatch = False,
    split: SplitOption = SplitName.TEST,
    margin: Margin = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Write loss curves and differences to this file (PNG, PDF, SVG).")
    ] = None,
    jobs: Annotated[int, typer.Option(min=0, help="Cells trained at a time, if routers must be trained first.")] = 0,
    axis: AxisOption = None,
    effective_compute: EffectiveCompute = False,
    details: Details = False,
    json: Json = False,
) -> None:
    """Compare the arms of an experiment: quality with intervals, load balance, throughput, cost.

    Seeds are paired, differences to the baseline have a 95 % t interval and a p value corrected for many
    comparisons (Holm). Arms whose executed FLOPs differ by more than 2 % get no verdict. Works on a grid that is
    still running. Several experiments that share arms are pooled. Given routers instead of an experiment, trains what
    is missing first.
    """
    overrides = [name for name in names if "=" in name]
    subjects = [name for name in names if "=" not in name]
    choice = CompareOptions(split.value, allow_mismatch, effective_compute, axis.value if axis else None, plot, margin)
    choice = replace(choice, details=details or markdown or json)
    check_compare_options(choice)
    if are_experiments(subjects, plugins=plugin or ()):
        grids = expand_all(subjects, overrides, size or [None], plugin or (), results)
        report = compare_experiments(grids, results, choice)
    else:
        require_one_size(subjects, size, effective_compute=effective_compute)
        from moebench.experiment.grid import expand_routers

        grid = expand_routers(subjects, task, add_size(overrides, size[0] if size else None), plugin or ())
        train_missing(grid, results, jobs)
        report = compare_one(grid, results, choice)
    print_report(report, json=json, markdown=markdown)


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
