"""What is known about a registered component, for reading: facts, options with their defaults, source."""

import dataclasses
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from moebench.config import to_plain
from moebench.errors import UsageError, nearest
from moebench.registry import field_docs, registry_of

KINDS = ("router", "layout", "task", "loss")
CAUSALITY_KEYS = {
    "reason": "causal_reason",
    "with_capacity": "causal_with_capacity",
    "in_evaluation": "causal_in_evaluation",
}
"""Names of `Causality`'s fields in `list --json` and `show --json`, where they stand beside other facts."""


def describe(name: str) -> dict[str, Any]:
    """Return everything known about a component; raise UsageError for an unknown name."""
    known: list[str] = []
    for kind in KINDS:
        registry = registry_of(kind)
        if name in registry.names():
            entry = registry.get(name)
            config = getattr(entry.item, "Config", None)
            return {
                "name": name,
                "kind": kind,
                **facts_to_dict(entry.facts),
                "about": entry.doc,
                "options": _options(config) if config else [],
                "source": entry.origin,
            }
        known += registry.names()
    raise UsageError(f"'{name}' is unknown.{nearest(name, known)} Allowed: {', '.join(known)}")


def facts_to_dict(facts: Any) -> dict[str, Any]:
    """Return facts by name; those on the causality of a router beside its others."""
    values = dataclasses.asdict(facts)
    causality = values.pop("causality", {})
    return values | {CAUSALITY_KEYS.get(name, name): value for name, value in causality.items()}


def _options(config: Any) -> list[dict[str, Any]]:
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
    parent = config.__mro__[1]
    shared = {field.name for field in dataclasses.fields(parent)} if dataclasses.is_dataclass(parent) else set()
    fields = [field for field in dataclasses.fields(config) if field.name != "name"]
    return sorted(fields, key=lambda field: field.name in shared)


def type_name(annotation: Any) -> str:
    """Return a type as a user writes its values: choices as they are, other types by name."""
    if get_origin(annotation) is Literal:
        return " | ".join(str(choice) for choice in get_args(annotation))
    choices = get_args(annotation)
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join(type_name(choice) for choice in choices)
    if choices:
        return f"{get_origin(annotation).__name__}[{', '.join(type_name(choice) for choice in choices)}]"
    return "None" if annotation is type(None) else str(getattr(annotation, "__name__", annotation))


def to_text(value: Any) -> str:
    """Return a fact or a default as text: yes and no, lists with commas, what YAML calls null."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "null" if value is None else str(value)
