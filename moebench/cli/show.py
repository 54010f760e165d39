"""`moebench show`: describe a component or a section of the configuration, or print the file of an experiment."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from moebench.cli.options import DEFAULT_RESULTS, Json, Plugins, Results, check_plot, complete_component, print_json
from moebench.errors import UsageError
from moebench.experiment.files import find_experiment, list_sizes
from moebench.printable import print_text

Name = Annotated[
    str | None,
    typer.Argument(
        help="A router, layout, task, loss or size (`moebench list`); a section of the configuration (train, model,"
        " data, ...); a key (train.steps); hf:FOLDER of a model; run:ID; or the word `experiment`.",
        autocompletion=complete_component,
    ),
]
ExperimentFile = Annotated[
    str | None, typer.Argument(metavar="[EXPERIMENT]", help="After `experiment`: name of the experiment to print.")
]
AllRouters = Annotated[bool, typer.Option("--all-routers", help="Print all routers, as Markdown.")]
AllOptions = Annotated[
    bool,
    typer.Option("--all-options", help="Print all options, as Markdown (docs/configuration.md)."),
]
Out = Annotated[
    Path | None,
    typer.Option(help="With --all-routers: write routers.md and routers/FAMILY.md to this folder instead of printing."),
]
Plot = Annotated[Path | None, typer.Option(help="Draw where a router sends a few tokens (PNG, PDF, SVG).")]


def show(
    name: Name = None,
    experiment: ExperimentFile = None,
    all_routers: AllRouters = False,
    all_options: AllOptions = False,
    out: Out = None,
    plot: Plot = None,
    plugin: Plugins = None,
    results: Results = DEFAULT_RESULTS,
    json: Json = False,
) -> None:
    """Show equation, facts, options with defaults and source of a component, or the options of a section.

    `moebench show experiment quickstart > mine.yaml` copies an experiment, to be changed. `moebench show hf:FOLDER`
    prints the settings of a model of transformers, for the `base` of an experiment that starts from it; `moebench show
    run:ID` the settings of a run, and what it has taken from its parent.
    """
    if name == "experiment" and experiment is not None:
        _print_file(find_experiment(experiment), json=json)
        return
    if name is not None and experiment is None and name in list_sizes():
        _print_file(list_sizes()[name], json=json)
        return
    if name is not None and experiment is None and name.startswith(("hf:", "run:")):
        _print_model(name, results, json=json)
        return
    if experiment is not None or [name is not None, all_routers, all_options].count(True) != 1:
        raise UsageError(
            "show: give one of a name (`moebench list`), `experiment` and a name, --all-routers and --all-options"
        )
    _check_output_options(plot, out, has_name=name is not None, prints_routers=all_routers and not json)
    from moebench.registry import load_plugin

    for path in plugin or ():
        load_plugin(path)
    if out:
        _write_router_pages(out)
        return
    descriptions = _describe(name, all_routers=all_routers)
    if plot:
        _draw(descriptions[0], plot)
    if json:
        print_json(descriptions[0] if name else descriptions)
    elif name:
        _print(descriptions[0])
    else:
        from moebench.catalogue.configuration import render_configuration_page
        from moebench.catalogue.pages import render_routers_page

        print_text(render_routers_page() if all_routers else render_configuration_page(), end="")


def _check_output_options(plot: Path | None, out: Path | None, *, has_name: bool, prints_routers: bool) -> None:
    """Raise UsageError for --plot or --out where the command does not print what they replace."""
    if plot and not has_name:
        raise UsageError("--plot: draws one router; give its name")
    if out and not prints_routers:
        raise UsageError("--out: writes Markdown; allowed with --all-routers and without --json")


def _write_router_pages(folder: Path) -> None:
    from moebench.catalogue.pages import write_router_pages

    for file in write_router_pages(folder):
        print_text(str(file))


def _describe(name: str | None, *, all_routers: bool) -> list[dict[str, Any]]:
    from moebench.catalogue.configuration import SECTIONS, describe_name, describe_section
    from moebench.catalogue.describe import describe
    from moebench.registry import get_registry

    if name is not None:
        return [describe_name(name)]
    if all_routers:
        return [describe(router) for router in get_registry("router").names()]
    return [describe_section(section) for section in SECTIONS]


def _print_file(file: Path, *, json: bool) -> None:
    text = file.read_text(encoding="utf-8")
    if json:
        print_json({"name": file.stem, "file": str(file), "text": text})
    elif sys.stdout.isatty():
        print_text(text, end="")
    else:
        sys.stdout.write(text)  # a copy, character by character


def _print_model(name: str, results: Path, *, json: bool) -> None:
    """Print the settings of a model of transformers, or of a run, as YAML."""
    from moebench.catalogue.parents import describe_parent, describe_run
    from moebench.config import format_yaml

    settings = describe_parent(name) if name.startswith("hf:") else describe_run(name, results)
    if json:
        print_json(settings)
    else:
        print_text(format_yaml(settings), end="")


def _draw(description: dict[str, Any], plot: Path) -> None:
    if description["kind"] != "router":
        raise UsageError(f"--plot: '{description['name']}' is a {description['kind']}; only routers are drawn")
    check_plot(plot)
    from moebench.catalogue.figure import draw_router

    draw_router(description["name"], plot)


def _print(description: dict[str, Any]) -> None:
    from rich.padding import Padding

    from moebench.catalogue.configuration import format_option
    from moebench.catalogue.describe import join_paragraph_lines, to_text
    from moebench.cli.output import make_console

    console = make_console()
    console.print(f"{description['name']}  ({description['kind']})\n")
    if description["about"]:
        console.print(f"{join_paragraph_lines(description['about'])}\n")
    for title, key in (("When to use it", "use"), ("What can go wrong", "beware")):
        if description.get(key):
            console.print(f"{title}: {description[key]}\n")
    elsewhere = {"name", "kind", "about", "options", "use", "beware"}
    facts = {key: value for key, value in description.items() if key not in elsewhere}
    for key, value in facts.items():
        if value not in (None, "", (), []):
            text = f"O({value})" if key == "cost" else to_text(value)
            console.print(f"{key.replace('_', ' '):<22}{text}")
    if facts and description["options"]:
        console.print()
    for option in description["options"]:
        heading, meaning = format_option(option)
        console.print(heading)
        console.print(Padding(meaning, (0, 0, 0, 4)))
