"""`moebench ui`: MLflow's user interface on the results."""

from typing import Annotated

import typer

from moebench.cli.options import DEFAULT_RESULTS, Json, Results, print_json
from moebench.printable import print_text

MAX_LINKS = 10


def ui(
    results: Results = DEFAULT_RESULTS,
    tracker: Annotated[str | None, typer.Option(envvar="MOEBENCH_TRACKER", help="MLflow database URI.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; by default this machine only.")] = ("127.0.0.1"),
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 5000,
    json: Json = False,
) -> None:
    """Open the MLflow UI on the results, until Ctrl-C.

    One worker, reachable from this machine only, no telemetry. The printed links open the charts of an experiment, its
    runs grouped by router or arm.
    """
    from moebench.tracking.ui import list_links, serve

    def print_url(url: str) -> None:
        links = list_links(results, tracker, url)
        if json:
            print_json({"url": url, "experiments": links}, indent=None)
            return
        print_text(f"MLflow UI at {url}  (Ctrl-C stops it)")
        for name, link in [*links.items()][:MAX_LINKS]:
            print_text(f"  {name}: {link}")
        if len(links) > MAX_LINKS:
            print_text(f"  {len(links) - MAX_LINKS} more experiments: --json lists all")

    raise typer.Exit(serve(results, tracker, host=host, port=port, on_ready=print_url))
