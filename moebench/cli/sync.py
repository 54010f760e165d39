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
    from moebench.analysis.compare.summary import refresh_summaries
    from moebench.tracking.address import check_uri, default_uri, format_sync, redact_uri, require_tracker
    from moebench.tracking.mlflow_store import TrackerError
    from moebench.tracking.replay import replay
    from moebench.tracking.source import list_unreadable

    if tracker:
        require_tracker(tracker)
        check_uri(tracker)
    uri = tracker or default_uri(results)
    try:
        if results.is_dir():
            refresh_summaries(results)
        report = replay(results, uri)
        report = replace(report, problems=(*report.problems, *list_unreadable(results)))
    except TrackerError as error:
        print_text(
            f"tracker: {error}; nothing is lost: {format_sync(results, tracker)} sends it later", file=sys.stderr
        )
        raise typer.Exit(EXIT_DEGRADED) from error
    if json:
        print_json(asdict(report), indent=None)
    else:
        print_text(f"{report.values} values of {report.runs} runs sent to {redact_uri(uri)}")
        for problem in report.problems:
            print_text(f"not sent: {problem}", file=sys.stderr)
    if report.problems:
        raise typer.Exit(EXIT_DEGRADED)
