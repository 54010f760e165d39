"""What a run has taken from its parent, as its folder records it and as one line."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from moebench.reporting.formatting import format_count
from moebench.training.initial_weights.load import LoadedWeights
from moebench.training.initial_weights.plan import CopyMethod

_BLOCK = re.compile(r"\.blocks\.\d+\.")


def describe_loaded(loaded: LoadedWeights, shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    """Return what was taken, drawn and not used, JSON-ready: names over all blocks -> number of tensors.

    `shapes`: those of the child.
    """
    plan = loaded.plan
    taken = {way.value: _count_names(each.target for each in plan.of(way)) for way in CopyMethod if plan.of(way)}
    return {
        "parent": loaded.parent,
        "taken": taken,
        "copied_experts": {str(expert): of for expert, of in loaded.copied_experts.items()},
        "combined": {
            kind: _count_names(name for name, of in loaded.combined.items() if of == kind)
            for kind in sorted({*loaded.combined.values()})
        },
        "new": _count_names(plan.new),
        "zeroed": _count_names(plan.zeroed),
        "unused": _count_names(plan.unused),
        "taken_params": sum(shapes[each.target].numel() for each in plan.taken),
        "new_params": sum(shapes[name].numel() for name in plan.new),
        "new_experts": _count_names(f"{name}[{expert}]" for name, of in loaded.new_experts.items() for expert in of),
    }


def summarise_loaded(record: Mapping[str, Any]) -> str:
    """Return one line on what `describe_loaded` describes."""
    parts = [f"{format_count(record['taken_params'])} parameters taken from {record['parent']}"]
    parts += [f"{way}: {_join(names)}" for way, names in record["taken"].items() if way != CopyMethod.WHOLE.value]
    for title, key in (("new", "new"), ("0", "zeroed"), ("not used", "unused")):
        if record[key]:
            parts.append(f"{title}: {_join(record[key])}")
    parts += [f"new expert {expert} starts as {of}" for expert, of in record["copied_experts"].items()]
    return f"init: {'; '.join(parts)}"


def _count_names(names: Iterable[str]) -> dict[str, int]:
    """Return name -> number of tensors; blocks are counted together."""
    counts: dict[str, int] = {}
    for name in names:
        key = _BLOCK.sub(".blocks.*.", name)
        counts[key] = counts.get(key, 0) + 1
    return counts


def _join(names: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count})" if count > 1 else name for name, count in names.items())
