"""`moebench calibrate`: published results, computed again with this code."""

from pathlib import Path
from typing import Annotated

import typer

from moebench.cli.options import Json
from moebench.cli.output import make_console, print_report
from moebench.errors import build_unknown_error

app = typer.Typer(help="Repeat published results with this code and show the deviations.", no_args_is_help=True)

Markdown = Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")]


@app.command()
def chen(
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Runs of each model in each setting.")] = 10,
    setting: Annotated[list[str] | None, typer.Option(help="S1, S2, S3 or S4. Repeatable. Default: all.")] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="'MoE nonlinear', 'MoE linear', 'single nonlinear', 'single linear'. Repeatable. Default: all."
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(min=0, help="Runs at a time; 0: one for each core.")] = 0,
    markdown: Markdown = False,
    json: Json = False,
) -> None:
    """Train experts and single networks on the four synthetic settings of Chen et al. 2022 (arXiv:2208.02813).

    Routing, dispatch and combination are the code of every MoE layer. 10 seeds take about a quarter of an hour on
    two cores, more than half of it for the single networks.
    """
    from moebench.calibration.chen2022.data import SETTINGS
    from moebench.calibration.chen2022.measure import Outcomes, Run, list_runs, measure_runs
    from moebench.calibration.chen2022.report import build_report, format_progress
    from moebench.calibration.chen2022.training import KINDS, TrainingOutcome
    from moebench.cores import available_cores

    settings = [
        each for each in SETTINGS if each.name in _check_names("--setting", setting, [s.name for s in SETTINGS])
    ]
    kinds = [kind for kind in KINDS if kind.name in _check_names("--model", model, [kind.name for kind in KINDS])]
    console = make_console(stderr=True)

    outcomes: Outcomes = {}

    def show(run: Run, outcome: TrainingOutcome) -> None:
        outcomes.setdefault((run.setting.name, run.kind.name), []).append(outcome)
        console.print(format_progress(run, outcome), highlight=False, markup=False)

    try:
        measure_runs(list_runs(settings, kinds, seeds), jobs or available_cores(), show)
    except KeyboardInterrupt:  # what is finished took minutes
        if outcomes:
            print_report(build_report(outcomes), json=json, markdown=markdown)
        raise
    print_report(build_report(outcomes), json=json, markdown=markdown)


@app.command()
def clark(
    data: Annotated[
        Path, typer.Option(metavar="FILE", help="curves.csv.gz of github.com/google-deepmind/scaling_laws_for_routing.")
    ],
    replicates: Annotated[int, typer.Option(min=100, max=100_000, help="Bootstrap fits.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 0,
    markdown: Markdown = False,
    json: Json = False,
) -> None:
    """Fit the bilinear law to the published losses of Clark et al. 2022 and compare it with their table 3.

    Takes a minute or less of one core.
    """
    from moebench.calibration.clark2022.curves import read_curves
    from moebench.calibration.clark2022.refit import build_report, refit

    print_report(build_report(refit(read_curves(data), replicates, seed)), json=json, markdown=markdown)


def _check_names(option: str, given: list[str] | None, allowed: list[str]) -> list[str]:
    for name in given or ():
        if name not in allowed:
            raise build_unknown_error(option, name, allowed)
    return given or allowed
