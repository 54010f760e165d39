"""`moebench scaling`: the scaling law of each router over model sizes and numbers of experts."""

from typing import Annotated

import typer

from moebench.cli.compare import SplitName, SplitOption
from moebench.cli.comparisons import expand_all
from moebench.cli.options import DEFAULT_RESULTS, Json, Plugins, Results, complete_experiment
from moebench.cli.output import print_report
from moebench.errors import UsageError


def scaling(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="EXPERIMENT...  [KEY=VALUE]...",
            help="Experiments whose runs differ in model size and in layout.num_experts.",
            autocompletion=complete_experiment,
        ),
    ],
    size: Annotated[
        list[str] | None,
        typer.Option(
            help="Named size in place of the experiments' own (list sizes). Repeatable: all are fitted together."
        ),
    ] = None,
    results: Results = DEFAULT_RESULTS,
    plugin: Plugins = None,
    split: SplitOption = SplitName.TEST,
    replicates: Annotated[int, typer.Option(min=100, max=100_000, help="Bootstrap fits of each router.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 0,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
    json: Json = False,
) -> None:
    """Fit the bilinear law of Clark et al. 2022 to finished runs: loss against active parameters and experts.

    Dense runs count as one expert of every router. Needs at least three sizes, three numbers of experts and 1.5
    decades of training FLOPs.
    """
    from moebench.analysis.scaling.report import build_report, fit_laws
    from moebench.analysis.scaling.runs import collect_runs

    overrides = [name for name in names if "=" in name]
    subjects = [name for name in names if "=" not in name]
    if not subjects:
        raise UsageError("scaling: give one experiment or more; got none (moebench list experiments)")
    experiments = expand_all(subjects, overrides, size or [None], plugin or (), results)
    ladder = collect_runs(experiments, results, split.value)
    print_report(build_report(ladder, fit_laws(ladder, replicates, seed)), json=json, markdown=markdown)
