"""`moebench show`: what a router, layout, task or loss is; the file of an experiment."""

from pathlib import Path
from typing import Annotated, Any

import typer

from moebench.cli.options import Json, Plugins, check_plot, complete_component, print_json
from moebench.errors import UsageError
from moebench.experiment.files import find_experiment


def show(
    name: Annotated[
        str | None,
        typer.Argument(
            help="A router, layout, task or loss (`moebench list`), or the word `experiment`.",
            autocompletion=complete_component,
        ),
    ] = None,
    experiment: Annotated[
        str | None, typer.Argument(metavar="[EXPERIMENT]", help="After `experiment`: whose file to print.")
    ] = None,
    all_routers: Annotated[
        bool, typer.Option("--all-routers", help="All routers instead of one name, as the Markdown of docs/routers.md.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw how a router sends a few tokens to experts, into this PNG file.")
    ] = None,
    plugin: Plugins = None,
    json: Json = False,
) -> None:
    """Show what something is: equation, facts, options with their defaults, source.

    `moebench show experiment quickstart > mine.yaml` copies an experiment, to be changed.
    """
    if name == "experiment":
        _print_experiment(experiment, json=json)
        return
    if (name is None) is not all_routers or experiment is not None:
        raise UsageError("show: give one name (`moebench list`), `experiment` and a name, or --all-routers")
    if all_routers and plot:
        raise UsageError("--plot: draws one router, give its name instead of --all-routers")
    from moebench.catalogue.describe import describe
    from moebench.registry import load_plugin, registry_of

    for path in plugin or ():
        load_plugin(path)
    descriptions = [describe(component) for component in ([name] if name else registry_of("router").names())]
    if plot:
        _draw(descriptions[0], plot)
    if json:
        print_json(descriptions[0] if name else descriptions)
    elif name:
        _print(descriptions[0])
    else:
        from moebench.catalogue.pages import render_routers_page

        print(render_routers_page(), end="")


def _print_experiment(name: str | None, *, json: bool) -> None:
    if name is None:
        raise UsageError("show experiment: give its name (`moebench list experiments`)")
    file = find_experiment(name)
    text = file.read_text(encoding="utf-8")
    print_json({"name": file.stem, "file": str(file), "text": text}) if json else print(text, end="")


def _draw(description: dict[str, Any], plot: Path) -> None:
    if description["kind"] != "router":
        raise UsageError(f"--plot: '{description['name']}' is a {description['kind']}; only routers are drawn")
    check_plot(plot)
    from moebench.catalogue.figure import draw_router

    draw_router(description["name"], plot)


def _print(description: dict[str, Any]) -> None:
    from rich.console import Console

    from moebench.catalogue.describe import to_text
    from moebench.cli.output import print_table

    lines = [f"{description['name']}  ({description['kind']})", "", description["about"], ""]
    for title, key in (("When to use it", "use"), ("What can go wrong", "beware")):
        if description.get(key):
            lines += [f"{title}: {description[key]}", ""]
    printed = {"name", "kind", "about", "options", "source", "use", "beware"}
    for key, value in description.items():
        if key not in printed and value not in (None, (), []):
            text = f"O({value})" if key == "cost" else to_text(value)
            lines.append(f"{key.replace('_', ' '):<22}{text}")
    lines.append(f"{'source':<22}{description['source']}")
    console = Console()
    for line in lines:
        console.print(line, highlight=False, markup=False)
    if description["options"]:
        print()
        columns = ("name", "default", "type", "about")
        rows = [[str(option[column]) for column in columns] for option in description["options"]]
        print_table(["option", *columns[1:]], rows, no_wrap=("option",))
