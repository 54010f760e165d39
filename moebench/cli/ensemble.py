"""`moebench ensemble`: finished runs, mixed by the posterior over them."""

from typing import Annotated

import typer

from moebench.cli.options import DEFAULT_RESULTS, Json, Plugins, Results
from moebench.cli.output import print_progress, print_report


def ensemble(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Ids of two or more runs, or their beginnings.")],
    results: Results = DEFAULT_RESULTS,
    plugin: Plugins = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
    json: Json = False,
) -> None:
    """Measure finished language models as one ensemble on the test split, by domain; nothing is trained.

    As in branch-train-merge (arXiv:2208.03306): each run, for example one for each domain, predicts the next token, and
    the probabilities are mixed by the posterior over runs given the text so far. An ensemble of M runs executes the
    FLOPs of all of them.
    """
    from moebench.analysis.ensemble.measure import measure_ensemble
    from moebench.analysis.ensemble.report import build_report

    quality = measure_ensemble(results, runs, plugin or (), print_progress("batches"))
    print_report(build_report(quality), json=json, markdown=markdown)
