"""`moebench ui`: MLflow's user interface on the results."""

from typing import Annotated

import typer

from moebench.cli.options import DEFAULT_RESULTS, Json, Results, print_json
from moebench.printable import print_text


def ui(
    results: Results = DEFAULT_RESULTS,
    tracker: Annotated[str | None, typer.Option(envvar="MOEBENCH_TRACKER", help="MLflow database URI.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; by default this machine only.")] = ("127.0.0.1"),
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 5000,
    json: Json = False,
) -> None:
    """Open the MLflow UI on the results, until Ctrl-C.

    One worker, reachable from this machine only, no telemetry.
    """
    from moebench.tracking.ui import serve

    def print_url(url: str) -> None:
        if json:
            print_json({"url": url}, indent=None)
        else:
            print_text(f"MLflow UI at {url}  (Ctrl-C stops it)")

    raise typer.Exit(serve(results, tracker, host=host, port=port, on_ready=print_url))
