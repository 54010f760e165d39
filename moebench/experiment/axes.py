"""Axes of a grid: which of its keys mean something to an arm, and which overrides contradict it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from moebench.config import component_keys
from moebench.errors import UsageError
from moebench.routing.router import ROUTERS
from moebench.schema import COMPONENTS, DEFAULT_NAMES

ARM = "arm"
"""The grid key whose values set several keys of a cell at once."""
ROUTED_SECTIONS = ("layout", "balance")
"""Sections that mean nothing to a dense model: it has no experts, wherever a layout would put them."""


def component_name(raw: Mapping[str, Any], kind: str) -> str:
    """Return the name of a component of an untyped cell."""
    value = raw.get(kind, {})
    return str(value.get("name", DEFAULT_NAMES[kind]) if isinstance(value, Mapping) else value)


def is_dense(router: str) -> bool:
    """Return whether models with this router have no experts; raise UsageError for an unknown router."""
    return ROUTERS.get(router, where="router.name").item.form.is_dense


def lacks_option(raw: Mapping[str, Any], key: str) -> bool:
    """Return whether a grid key names an option that the component of an untyped cell does not have."""
    kind, _, option = key.partition(".")
    if kind not in COMPONENTS or not option or option == "name":
        return False
    return option.split(".")[0] not in component_keys(kind, component_name(raw, kind))


def has_no_effect(raw: Mapping[str, Any], key: str) -> bool:
    """Return whether a grid key changes no result of an untyped cell, because its model is dense."""
    return key not in (ARM, "router", "router.name") and is_unused_by(component_name(raw, "router"), key)


def is_unused_by(router: str, key: str) -> bool:
    """Return whether a key changes no result of models with this router.

    A dense model has nothing of experts and routers, and a router that is not learned no learning rate.
    """
    section, *parts = key.split(".")
    is_of_gate = section == "train" and _names(parts, "router")
    if is_dense(router):
        is_of_experts = section in (*ROUTED_SECTIONS, "router") or (section == "train" and _names(parts, "expert"))
        is_of_experts |= key == "train.trainable"  # the parts that it tells apart are experts, routers and the rest
        return is_of_experts or is_of_gate
    return is_of_gate and not ROUTERS.get(router).facts.learned


def _names(parts: Sequence[str], subject: str) -> bool:
    """Return whether a part of a key begins with this word, as `router_learning_rate` does with router."""
    return any(part.split("_")[0].removesuffix("s") == subject for part in parts)


def refuse_varied_keys(overrides: Mapping[str, Any], grid: Iterable[str], section: str) -> None:
    """Raise UsageError for an override (dotted key -> value) of a key that `section` (grid, tune.grid) varies.

    An override of an option of a varied component is none of these: it applies to the arms that have it.
    """
    for key, value in overrides.items():
        for varied in grid:
            if varied == ARM or (section == "grid" and varied in COMPONENTS):
                continue
            if f"{key}.".startswith(f"{varied}.") or f"{varied}.".startswith(f"{key}."):
                values = value if varied == key else "..."
                varies = "it" if varied == key else varied
                raise UsageError(
                    f"{key}: {section} varies {varies}; choose its values with '{section}.{varied}=[{values}]' instead"
                )


def note_dropped_axes(labels: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield a note for each label of an arm whose grid keys `labels` were left out."""
    for label, keys in labels.items():
        yield f"{label} is in the grid once: {', '.join(keys)} means nothing to it"
