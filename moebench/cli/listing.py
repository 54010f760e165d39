"""`moebench list`: routers, layouts, tasks, losses, experiments, sizes, runs."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moebench.cli.options import DEFAULT_RESULTS, Json, Plugins, Results, print_json
from moebench.errors import UsageError
from moebench.experiment.files import list_experiments
from moebench.printable import print_text

if TYPE_CHECKING:
    from moebench.runs.folder import RunFolder


class Kind(StrEnum):
    """What can be listed."""

    ROUTERS = "routers"
    LAYOUTS = "layouts"
    TASKS = "tasks"
    LOSSES = "losses"
    METRICS = "metrics"
    EXPERIMENTS = "experiments"
    SIZES = "sizes"
    RUNS = "runs"


COLUMNS = {
    Kind.LAYOUTS: ("name", "experts", "placement", "paper"),
    Kind.TASKS: ("name", "causal", "metric", "data"),
    Kind.LOSSES: ("name", "equation", "uniform", "collapsed", "paper"),
    Kind.EXPERIMENTS: ("name", "origin", "question"),
    Kind.SIZES: ("name", "FLOPs", "model", "tokens", "tasks", "about"),
    Kind.RUNS: ("id", "experiment", "arm", "seed", "state", "error"),
}
"""Columns of the table; routers have their own table."""
SINGULAR = {Kind.ROUTERS: "router", Kind.LAYOUTS: "layout", Kind.TASKS: "task", Kind.LOSSES: "loss"}


def list_(
    kind: Annotated[Kind, typer.Argument(help="What to list.")] = Kind.ROUTERS,
    results: Results = DEFAULT_RESULTS,
    plugin: Plugins = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
    json: Json = False,
) -> None:
    """List routers (family, causality, source), layouts, tasks, losses, metrics, experiments, sizes or runs."""
    if kind is Kind.METRICS:
        _print_metrics(json=json, markdown=markdown)
        return
    from moebench.registry import load_plugin

    for path in plugin or ():
        load_plugin(path)
    if kind is Kind.EXPERIMENTS:
        rows = _experiment_rows()
    elif kind is Kind.SIZES:
        from moebench.catalogue.sizes import list_size_rows

        rows = list_size_rows()
    elif kind is Kind.RUNS:
        rows = _run_rows(results)
    else:
        rows = _component_rows(SINGULAR[kind])
    if json:
        print_json(rows)
    else:
        _print(rows, kind, markdown=markdown)


def _component_rows(kind: str) -> list[dict[str, Any]]:
    from moebench.catalogue.describe import facts_to_dict
    from moebench.registry import get_registry

    return [
        {"name": entry.name, **facts_to_dict(entry.facts), "summary": entry.doc.split("\n")[0]}
        for entry in get_registry(kind).entries()
    ]


def _experiment_rows() -> list[dict[str, Any]]:
    from moebench.config import load_experiment

    return [
        {
            "name": name,
            "origin": experiment.origin,
            "file": str(experiment.file),
            "question": load_experiment(experiment.file)[0].question,
        }
        for name, experiment in list_experiments().items()
    ]


def _run_rows(results: Path) -> list[dict[str, Any]]:
    from moebench.runs.folder import list_run_folders

    return [_run_row(folder) for folder in list_run_folders(results)]


def _run_row(folder: "RunFolder") -> dict[str, Any]:
    row: dict[str, Any] = {"id": folder.path.name, "experiment": None, "arm": None, "seed": None}
    try:
        cell, result = folder.read_cell(), folder.read_result()
        row |= {key: cell[key] for key in row}
        row |= {"state": folder.describe_state(), "error": result.error if result else None}
    except UsageError as error:
        row |= {"state": "damaged", "error": str(error)}
    return row | {"folder": str(folder.path)}


def _print_metrics(*, json: bool, markdown: bool) -> None:
    from moebench.catalogue.metrics import build_metrics_report, render_metrics_page
    from moebench.cli.output import print_report

    if markdown and not json:
        print_text(render_metrics_page(), end="")
    else:
        print_report(build_metrics_report(), json=json, markdown=False)


def _print(rows: list[dict[str, Any]], kind: Kind, *, markdown: bool) -> None:
    from moebench.catalogue.describe import to_text
    from moebench.cli.output import print_table

    if not rows:
        print_text(f"no {kind.value} here")
        return
    if kind is Kind.ROUTERS:
        from moebench.catalogue.pages import summarise

        columns, lines = _stack_columns([summarise(row) for row in rows])
    else:
        columns = COLUMNS[kind]
        lines = [["" if row[column] is None else to_text(row[column]) for column in columns] for row in rows]
    no_wrap = ("id", "name", "router\nfamily", "causal", "batch", "any k", "even", "learns")
    print_table(columns, lines, no_wrap=no_wrap, markdown=markdown)


def _stack_columns(cells: list[dict[str, str]]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Put the family below the name and the losses below the paper, so that the table fits into 80 columns."""
    below = {"router": "family", "paper": "own losses"}
    columns = tuple(name for name in cells[0] if name not in below.values())
    lines = [
        [f"{cell[name]}\n{cell[below[name]]}" if name in below else cell[name] for name in columns] for cell in cells
    ]
    heads = tuple(f"{name}\n{below[name]}" if name in below else name for name in columns)
    return heads, lines
