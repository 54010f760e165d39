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
        str, typer.Option(metavar="KEY=V1,V2,...", help="The setting and its values: layout.capacity_factor_eval=0.5,1")
    ] = "",
    by: Annotated[
        str | None,
        typer.Option(metavar="KEY=A,B", help="A second one: router.priority=best,position"),
    ] = None,
    results: Results = DEFAULT_RESULTS,
    plugin: Plugins = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write the curves to this PNG, PDF or SVG file.")] = None,
    json: Json = False,
) -> None:
    """Evaluate the finished runs of an experiment under other settings, from their last checkpoints.

    Nothing is trained. What may vary are keys of layout and router that leave the parameters as they are: capacity in
    evaluation and its rule, the order of dropping, overflow, experts per token. FLOPs are relative to the run as
    trained without a capacity.
    """
    from moebench.analysis.sweep.figure import build_report, draw_curve
    from moebench.analysis.sweep.measure import Setting, measure
    from moebench.cli.output import make_console
    from moebench.experiment.grid import expand

    check_plot(plot)
    settings = Setting.parse(vary, "--vary"), Setting.parse(by, "--by") if by is not None else None
    grid = expand(find_experiment(experiment), add_size(overrides, size), plugin or ())
    console = make_console(stderr=True)
    setting_curve = measure(
        grid, results, *settings, report_progress=lambda line: console.print(line, highlight=False, markup=False)
    )
    if plot:
        draw_curve(setting_curve, plot)
    print_report(build_report(setting_curve), json=json, markdown=markdown)
