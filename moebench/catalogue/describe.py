"""What is known about a registered component, for reading: facts, options with their defaults, source."""

import dataclasses
from typing import Any

from moebench.catalogue.options import list_options
from moebench.errors import UsageError, suggest
from moebench.registry import get_registry

KINDS = ("router", "layout", "task", "loss")
CAUSALITY_KEYS = {
    "reason": "causal_reason",
    "with_capacity": "causal_with_capacity",
    "in_evaluation": "causal_in_evaluation",
}
"""Names of `Causality`'s fields in `list --json` and `show --json`, where they are listed beside other facts."""


def describe(name: str) -> dict[str, Any]:
    """Return everything known about a component; raise UsageError for an unknown name."""
    known: list[str] = []
    for kind in KINDS:
        registry = get_registry(kind)
        if name in registry.names():
            entry = registry.get(name)
            config = getattr(entry.item, "Config", None)
            return {
                "name": name,
                "kind": kind,
                **facts_to_dict(entry.facts),
                "about": entry.doc,
                "options": [option.to_dict() for option in list_options(config(), kind)] if config else [],
                "source": entry.origin,
            }
        known += registry.names()
    raise UsageError(f"'{name}' is unknown.{suggest(name, known)} Allowed: {', '.join(known)}")


def facts_to_dict(facts: Any) -> dict[str, Any]:
    """Return facts by name; those on the causality of a router beside its others."""
    values = dataclasses.asdict(facts)
    causality = values.pop("causality", {})
    if values.get("budget") is not None:
        values["budget"] = facts.budget.attribute
    return values | {CAUSALITY_KEYS.get(name, name): value for name, value in causality.items()}


def to_text(value: Any) -> str:
    """Return a fact or a default as text: yes and no, lists with commas, what YAML calls null."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "null" if value is None else str(value)


def join_paragraph_lines(text: str) -> str:
    """Join the lines of each paragraph, so that a terminal of any width can wrap them; indented lines stay."""
    lines: list[str] = []
    for line in text.split("\n"):
        continues = bool(lines and lines[-1] and line) and not line.startswith((" ", "- ")) and lines[-1][0] != " "
        if continues:
            lines[-1] += f" {line}"
        else:
            lines.append(line)
    return "\n".join(lines)
