"""The options of a configuration: key, type, default, allowed values and meaning, read from the schema itself."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from moebench.components import LayoutConfig, RouterConfig, TaskConfig
from moebench.config import to_plain
from moebench.conversion import Untyped, key_of
from moebench.ranges import describe_range
from moebench.registry import field_docs, get_registry
from moebench.schema import DEFAULT_NAMES

COMPONENT_CONFIGS = {"task": TaskConfig, "layout": LayoutConfig, "router": RouterConfig}
"""What every component of a kind has in its Config."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One key of a configuration."""

    key: str
    """Key as in an experiment file and on the command line, for example `train.learning_rate`."""
    name: str
    """The key without its section."""
    type: str
    default: Any
    """Default as plain data: dictionaries, lists and scalars."""
    allowed: str
    """Choices or range; empty where every value of the type is allowed."""
    about: str
    components: tuple[str, ...] = ()
    """Tasks, layouts or routers that have the option, where not all of a kind do."""

    @property
    def values(self) -> str:
        """Type and allowed values together: `int, at least 1`, `gelu | swiglu`, `true | false`."""
        if self.type == "bool":
            return "true | false"
        if not self.allowed or self.allowed.startswith(self.type.split(" | ")[0]):
            return self.type
        return f"{self.type.removesuffix(' | null')}, {self.allowed}"

    def to_dict(self) -> dict[str, Any]:
        """Return the option as plain data."""
        return {**dataclasses.asdict(self), "values": self.values}


def list_options(config: Any, section: str) -> list[Option]:
    """Return the options of a configuration, those of nested configurations in place of the field that holds them.

    The name of a component is left out; what its own class adds comes before what it inherits.
    """
    return list(_options(config, section, prefix=""))


def _options(config: Any, section: str, prefix: str) -> Iterator[Option]:
    docs, defaults = field_docs(type(config)), to_plain(config)
    for field in _list_fields_own_first(type(config)):
        key = key_of(field.name)
        name = f"{prefix}{key}"
        if dataclasses.is_dataclass(getattr(config, field.name)):
            yield from _options(getattr(config, field.name), section, f"{name}.")
            continue
        yield Option(
            key=f"{section}.{name}" if section else name,
            name=name,
            type=type_name(field.type),
            default=defaults[key],
            allowed=_describe_allowed_values(field.type) or describe_range(type(config), field.name),
            about=docs.get(field.name, ""),
        )


def _list_fields_own_first(config_class: Any) -> list[Any]:
    parent = config_class.__mro__[1]
    inherited = {field.name for field in dataclasses.fields(parent)} if dataclasses.is_dataclass(parent) else set()
    fields = [field for field in dataclasses.fields(config_class) if field.name != "name"]
    return sorted(fields, key=lambda field: field.name in inherited)


def component_options(kind: str) -> list[Option]:
    """Return the options of every task, layout or router: its name, what all have, then what some have.

    An option that several components have with equal type, default and meaning is returned once, with their names.
    """
    names = get_registry(kind).names()
    name = Option(
        key=f"{kind}.name",
        name="name",
        type="str",
        default=DEFAULT_NAMES[kind],
        allowed=", ".join(names),
        about=f"Which {kind} to use; `{kind}: NAME` is short for it.",
    )
    shared = list_options(COMPONENT_CONFIGS[kind](name=""), kind)
    merged: dict[str, Option] = {repr(option): option for option in shared}
    for entry in get_registry(kind).entries():
        for option in list_options(entry.item.Config(), kind):
            known = merged.setdefault(repr(option), option)
            if known not in shared:
                merged[repr(option)] = replace(known, components=(*known.components, entry.name))
    return [name, *merged.values()]


def type_name(annotation: Any) -> str:
    """Return a type as a user writes its values: choices as they are, other types by name."""
    if annotation == Untyped:
        return "any"
    if get_origin(annotation) is Literal:
        return " | ".join(str(choice) for choice in get_args(annotation))
    members = get_args(annotation)
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join(type_name(member) for member in members)
    if members:
        return f"{get_origin(annotation).__name__}[{', '.join(type_name(member) for member in members)}]"
    return "null" if annotation is NoneType else str(getattr(annotation, "__name__", annotation))


def _describe_allowed_values(annotation: Any) -> str:
    """Return the choices of a type that lists them, and an empty string for all others."""
    if annotation is bool:
        return "true, false"
    if get_origin(annotation) is Literal:
        return ", ".join(str(choice) for choice in get_args(annotation))
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else ()
    choices = [_describe_allowed_values(member) for member in members if member is not NoneType]
    return f"{choices[0]}, or null" if len(choices) == 1 and choices[0] else ""


def format_default(value: Any) -> str:
    """Return a default as it is written in YAML, on one line."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(format_default(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {format_default(item)}' for name, item in value.items())}}}"
    return "''" if value == "" else str(value)
