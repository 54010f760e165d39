"""`moebench show`: what a router, layout, task or loss is."""

from typing import Annotated, Any

import typer

from moebench.cli.options import Json, Plugins, complete_component
from moebench.errors import UsageError, nearest

KINDS = ("router", "layout", "task", "loss")


def show(
    name: Annotated[
        str,
        typer.Argument(help="A router, layout, task or loss (`moebench list`).", autocompletion=complete_component),
    ],
    plugin: Plugins = None,
    json: Json = False,
) -> None:
    """Show what something is: equation, facts, options with their defaults, source."""
    from moebench.registry import load_plugin

    for path in plugin or ():
        load_plugin(path)
    found = describe(name)
    if json:
        import json as json_module

        print(json_module.dumps(found, indent=1, ensure_ascii=False))
        return
    _print(found)


def describe(name: str) -> dict[str, Any]:
    """Return everything known about a component; raise UsageError for an unknown name."""
    from dataclasses import asdict

    from moebench.registry import registry_of

    known: list[str] = []
    for kind in KINDS:
        registry = registry_of(kind)
        if name in registry.names():
            entry = registry.get(name)
            config = getattr(entry.item, "Config", None)
            return {
                "name": name,
                "kind": kind,
                **asdict(entry.facts),
                "about": entry.doc,
                "options": _options(config) if config else [],
                "source": entry.origin,
            }
        known += registry.names()
    raise UsageError(f"'{name}' is unknown.{nearest(name, known)} Allowed: {', '.join(known)}")


def _options(config: Any) -> list[dict[str, Any]]:
    from moebench.config import to_plain
    from moebench.registry import field_docs

    docs = field_docs(config)
    defaults = to_plain(config())
    return [
        {
            "name": field.name,
            "type": type_name(field.type),
            "default": defaults[field.name],
            "about": docs.get(field.name, ""),
        }
        for field in own_first(config)
    ]


def own_first(config: Any) -> list[Any]:
    """Return the fields of a Config without its name: its own before those that all of its kind have."""
    import dataclasses

    parent = config.__mro__[1]
    shared = {field.name for field in dataclasses.fields(parent)} if dataclasses.is_dataclass(parent) else set()
    fields = [field for field in dataclasses.fields(config) if field.name != "name"]
    return sorted(fields, key=lambda field: field.name in shared)


def type_name(annotation: Any) -> str:
    """Return a type as a user writes its values: choices as they are, other types by name."""
    from types import UnionType
    from typing import Literal, Union, get_args, get_origin

    if get_origin(annotation) is Literal:
        return " | ".join(str(choice) for choice in get_args(annotation))
    choices = get_args(annotation)
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join(type_name(choice) for choice in choices)
    if choices:
        return f"{get_origin(annotation).__name__}[{', '.join(type_name(choice) for choice in choices)}]"
    return "None" if annotation is type(None) else str(getattr(annotation, "__name__", annotation))


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console

    from moebench.cli.table import print_table

    console = Console()

    def say(text: str = "") -> None:
        console.print(text, highlight=False, markup=False)

    say(f"{found['name']}  ({found['kind']})")
    say()
    say(found["about"])
    say()
    shown = {"name", "kind", "about", "options", "source"}
    for key, value in found.items():
        if key not in shown and value not in (None, (), []):
            text = ("no", "yes")[value] if isinstance(value, bool) else value
            text = ", ".join(text) if isinstance(text, list | tuple) else text
            say(f"{key.replace('_', ' '):<22}{text}")
    say(f"{'source':<22}{found['source']}")
    if found["options"]:
        say()
        columns = ("name", "default", "type", "about")
        lines = [[str(option[column]) for column in columns] for option in found["options"]]
        print_table(["option", *columns[1:]], lines, whole=("option",))
