"""`moebench list`: what there is."""

from enum import StrEnum
from typing import Annotated, Any

import typer

from moebench.cli.options import DEFAULT_RESULTS, Json, Plugins, Results


class Kind(StrEnum):
    """What can be listed."""

    ROUTERS = "routers"
    LAYOUTS = "layouts"
    TASKS = "tasks"
    LOSSES = "losses"
    METRICS = "metrics"
    EXPERIMENTS = "experiments"
    RUNS = "runs"


def list_(
    kind: Annotated[Kind, typer.Argument(help="What to list.")] = Kind.ROUTERS,
    results: Results = DEFAULT_RESULTS,
    plugin: Plugins = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
    json: Json = False,
) -> None:
    """List routers (with their family, causality and source), layouts, tasks, losses, metrics, experiments or runs."""
    if kind is Kind.METRICS:
        _print_metrics(json=json, markdown=markdown)
        return
    from moebench.registry import load_plugin

    for path in plugin or ():
        load_plugin(path)
    rows = _rows(kind, results)
    if json:
        import json as json_module

        print(json_module.dumps(rows, indent=1, ensure_ascii=False))
        return
    _print(rows, kind, markdown=markdown)


def _rows(kind: Kind, results: Any) -> list[dict[str, Any]]:
    if kind is Kind.EXPERIMENTS:
        return _experiments()
    if kind is Kind.RUNS:
        return _runs(results)
    from dataclasses import asdict

    from moebench.registry import registry_of

    singular = {"routers": "router", "layouts": "layout", "tasks": "task", "losses": "loss"}[kind.value]
    return [
        {"name": entry.name, **asdict(entry.facts), "summary": entry.doc.split("\n")[0]}
        for entry in registry_of(singular).entries()
    ]


def _experiments() -> list[dict[str, Any]]:
    from moebench.config import load_experiment
    from moebench.experiment.files import experiment_names, find_experiment

    rows = []
    for name in experiment_names():
        file = find_experiment(name)
        rows.append({"name": name, "file": str(file), "question": load_experiment(file)[0].question})
    return rows


def _runs(results: Any) -> list[dict[str, Any]]:
    from moebench.runs.folder import RunFolder

    rows = []
    for path in sorted((results / "runs").glob("*/cell.json")):
        folder = RunFolder(path.parent)
        cell = folder.read_cell()
        result = folder.read_result()
        rows.append(
            {
                "id": cell["id"],
                "experiment": cell["experiment"],
                "arm": cell["arm"],
                "seed": cell["seed"],
                "state": folder.state(),
                "error": result.error if result else None,
                "folder": str(path.parent),
            }
        )
    return rows


COLUMNS = {
    Kind.LAYOUTS: ("name", "experts", "placement", "paper"),
    Kind.TASKS: ("name", "causal", "metric", "data"),
    Kind.LOSSES: ("name", "equation", "uniform", "collapsed", "paper"),
    Kind.EXPERIMENTS: ("name", "question"),
    Kind.RUNS: ("id", "experiment", "arm", "seed", "state", "error"),
}


def _print_metrics(*, json: bool, markdown: bool) -> None:
    from moebench.catalogue.metrics import build_metrics_report, render_metrics_page
    from moebench.cli.output import print_report

    if markdown and not json:
        print(render_metrics_page(), end="")
    else:
        print_report(build_metrics_report(), json=json, markdown=False)


def _print(rows: list[dict[str, Any]], kind: Kind, *, markdown: bool) -> None:
    from moebench.catalogue.describe import to_text
    from moebench.cli.output import print_table

    if not rows:
        print(f"no {kind.value} here")
        return
    if kind is Kind.ROUTERS:
        from moebench.catalogue.pages import summarize

        columns, lines = _in_two_lines([summarize(row) for row in rows])
    else:
        columns = COLUMNS[kind]
        lines = [["" if row[column] is None else to_text(row[column]) for column in columns] for row in rows]
    no_wrap = ("id", "name", "router\nfamily", "causal", "batch", "any k", "even", "learns")
    print_table(columns, lines, no_wrap=no_wrap, markdown=markdown)


def _in_two_lines(cells: list[dict[str, str]]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Put family and losses below name and paper: else 80 columns are too few."""
    below = {"router": "family", "paper": "own losses"}
    columns = tuple(name for name in cells[0] if name not in below.values())
    lines = [
        [f"{cell[name]}\n{cell[below[name]]}" if name in below else cell[name] for name in columns] for cell in cells
    ]
    heads = tuple(f"{name}\n{below[name]}" if name in below else name for name in columns)
    return heads, lines
