"""`moebench curve`: trained models evaluated again under other settings."""

from pathlib import Path
from typing import Annotated

import typer

from moebench.cli.options import (
    DEFAULT_RESULTS,
    ExperimentName,
    Json,
    Overrides,
    Plugins,
    Results,
    Size,
    add_size,
    check_plot,
)
from moebench.cli.output import print_report
from moebench.experiment.files import find_experiment


def curve(
    experiment: ExperimentName,
    overrides: Overrides = None,
    size: Size = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=V1,V2,...",
            help="A setting and its values: layout.capacity_factor_eval=0.5,1, short capacity=0.5,1. Repeatable:"
            " all combinations are evaluated.",
        ),
    ] = None,
    results: Results = DEFAULT_RESULTS,
    plugin: Plugins = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write the curves to this PNG, PDF or SVG file.")] = None,
    json: Json = False,
) -> None:
    """Evaluate the finished runs of an experiment under other settings, from their last checkpoints.

    Nothing is trained. Keys of layout and router that do not change the parameters can be varied: capacity in
    evaluation and its rule, drop order, overflow, experts per token. FLOPs per token are measured for each seed. An arm
    without any of the keys, such as a dense one, is evaluated as trained.
    """
    from moebench.analysis.sweep.axes import parse_axes
    from moebench.analysis.sweep.figure import draw_curve
    from moebench.analysis.sweep.measure import measure
    from moebench.analysis.sweep.report import build_report
    from moebench.cli.output import make_console
    from moebench.experiment.grid import expand

    check_plot(plot)
    grid = expand(find_experiment(experiment), add_size(overrides, size), plugin or ())
    console = make_console(stderr=True)
    axes = parse_axes(vary or (), [cell.config for cell in grid.cells])
    setting_curve = measure(
        grid, results, axes, report_progress=lambda line: console.print(line, highlight=False, markup=False)
    )
    if plot:
        draw_curve(setting_curve, plot)
    print_report(build_report(setting_curve), json=json, markdown=markdown)
