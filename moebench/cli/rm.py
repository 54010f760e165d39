"""`moebench rm`: remove a run, or an experiment with its runs."""

import sys
from typing import Annotated

import typer

from moebench.cli.options import DEFAULT_RESULTS, Json, Results, print_json
from moebench.errors import UsageError
from moebench.printable import print_text

EXIT_DEGRADED = 3


def rm(
    name: Annotated[
        str, typer.Argument(metavar="RUN|EXPERIMENT", help="Id of a run, or its beginning; or an experiment.")
    ],
    results: Results = DEFAULT_RESULTS,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    tracker: Annotated[
        str | None,
        typer.Option(envvar="MOEBENCH_TRACKER", help="MLflow URI; 'none' for no tracker. Default: SQLite in results."),
    ] = None,
    json: Json = False,
) -> None:
    """Remove a run, or an experiment with the runs that no other experiment has.

    Shows what will be removed and asks, on a terminal; elsewhere it needs --yes. A run that is being trained is never
    removed. The tracker marks the runs as deleted.
    """
    from moebench.experiment.removal import plan_removal, remove
    from moebench.tracking.address import NO_TRACKER, check_uri, default_uri

    if tracker not in (None, NO_TRACKER):
        check_uri(tracker)

    removal = plan_removal(results, name)
    values = removal.to_dict()
    if not json:
        for folder in removal.runs:
            print_text(f"run {folder.path.name}  {folder.path}")
        for cell_id in removal.kept:
            print_text(f"kept: run {cell_id}, which another experiment has")
        for path in removal.files:
            print_text(f"file {path}")
        for experiment, runs in removal.earlier.items():
            print_text(f"kept: its {runs} (moebench rm {experiment})")
        print_text(f"{len(removal.runs)} runs, {values['bytes'] / 2**20:.1f} MiB")
    if not yes:
        if json or not sys.stdin.isatty():
            raise UsageError(f"rm {name}: nothing was removed; add --yes to remove it without a question")
        typer.confirm("Remove this?", abort=True)
    problem = remove(results, removal, tracker or default_uri(results))
    if json:
        print_json(values | {"tracker": problem})
    else:
        print_text("removed")
    if problem:
        print_text(problem, file=sys.stderr)
        raise typer.Exit(EXIT_DEGRADED)
