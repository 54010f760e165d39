"""`moebench sync`: send pending values of runs to the tracker."""

import sys
from dataclasses import asdict, replace
from typing import Annotated

import typer

from moebench.cli.options import DEFAULT_RESULTS, Json, Results, print_json
from moebench.printable import print_text

EXIT_DEGRADED = 3


def sync(
    results: Results = DEFAULT_RESULTS,
    tracker: Annotated[
        str | None, typer.Option(envvar="MOEBENCH_TRACKER", help="MLflow URI. Default: SQLite in results.")
    ] = None,
    json: Json = False,
) -> None:
    """Send everything in the run folders that the tracker does not have; nothing is sent twice."""
    from moebench.tracking.mlflow_store import TrackerError, default_uri, redact_credentials
    from moebench.tracking.replay import replay
    from moebench.tracking.source import list_unreadable

    try:
        report = replay(results, tracker or default_uri(results))
        report = replace(report, problems=(*report.problems, *list_unreadable(results)))
    except TrackerError as error:
        print_text(f"tracker: {error}", file=sys.stderr)
        raise typer.Exit(EXIT_DEGRADED) from error
    if json:
        print_json(asdict(report), indent=None)
    else:
        address = redact_credentials(tracker or default_uri(results))
        print_text(f"{report.values} values of {report.runs} runs sent to {address}")
        for problem in report.problems:
            print_text(f"not sent: {problem}", file=sys.stderr)
    if report.problems:
        raise typer.Exit(EXIT_DEGRADED)
