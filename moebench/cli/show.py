"""`moebench show`: what a router, layout, task or loss is."""

from pathlib import Path
from typing import Annotated, Any

import typer

from moebench.cli.options import Json, Plugins, complete_component
from moebench.errors import UsageError


def show(
    name: Annotated[
        str | None,
        typer.Argument(help="A router, layout, task or loss (`moebench list`).", autocompletion=complete_component),
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
    """Show what something is: equation, facts, options with their defaults, source."""
    if (name is None) is not all_routers:
        raise UsageError("show: give a name (`moebench list`), or --all-routers")
    if all_routers and plot:
        raise UsageError("--plot: draws one router, give its name instead of --all-routers")
    from moebench.catalogue.describe import describe
    from moebench.registry import load_plugin, registry_of

    for path in plugin or ():
        load_plugin(path)
    found = [describe(one) for one in ([name] if name else registry_of("router").names())]
    if plot:
        _draw(found[0], plot)
    if json:
        import json as json_module

        print(json_module.dumps(found[0] if name else found, indent=1, ensure_ascii=False))
    elif name:
        _print(found[0])
    else:
        from moebench.catalogue.pages import render_routers_page

        print(render_routers_page(), end="")


def _draw(found: dict[str, Any], plot: Path) -> None:
    if found["kind"] != "router":
        raise UsageError(f"--plot: '{found['name']}' is a {found['kind']}; only routers are drawn")
    if plot.is_dir() or not plot.parent.is_dir():
        raise UsageError(f"--plot {plot}: must be a file in a folder that exists")
    from moebench.catalogue.figure import draw_router

    draw_router(found["name"], plot)


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console

    from moebench.catalogue.describe import to_text
    from moebench.cli.output import print_table

    console = Console()

    def say(text: str = "") -> None:
        console.print(text, highlight=False, markup=False)

    say(f"{found['name']}  ({found['kind']})")
    say()
    say(found["about"])
    say()
    for title, key in (("When to use it", "use"), ("What can go wrong", "beware")):
        if found.get(key):
            say(f"{title}: {found[key]}")
            say()
    shown = {"name", "kind", "about", "options", "source", "use", "beware"}
    for key, value in found.items():
        if key not in shown and value not in (None, (), []):
            text = f"O({value})" if key == "cost" else to_text(value)
            say(f"{key.replace('_', ' '):<22}{text}")
    say(f"{'source':<22}{found['source']}")
    if found["options"]:
        say()
        columns = ("name", "default", "type", "about")
        lines = [[str(option[column]) for column in columns] for option in found["options"]]
        print_table(["option", *columns[1:]], lines, no_wrap=("option",))
