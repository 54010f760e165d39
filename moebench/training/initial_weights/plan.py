"""What a child takes from its parent's weights: decided by the names and shapes of both, before anything is loaded."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch

from moebench.errors import UsageError
from moebench.pretrained.export.routing_rules import computes_same
from moebench.schema import CellConfig

ROUTER = ".router."
BANK = re.compile(r"(?P<layer>.*)\.bank\.(?P<path>(?:groups\.\d+\.)?)(?P<weight>w_in_EDF|w_out_EFD|b_in_EF|b_out_ED)")
"""Names of weights of a bank of feed-forward experts."""
DENSE_NAMES = {"w_in_EDF": "w_in_DF", "w_out_EFD": "w_out_FD", "b_in_EF": "b_in_F", "b_out_ED": "b_out_D"}
"""Weight of a bank -> the one of a dense network."""
SHARED = re.compile(r"(?P<layer>.*)\.shared\.(?P<weight>w_in_DF|w_out_FD|b_in_F|b_out_D)")
GATE = re.compile(r".*\.router\.gate\.weight_ED")
BY_EXPERT = re.compile(r".*\.router\.(gate\.(weight_ED|bias_E)|count_E)")
"""Names of weights and state of routers with a row for each expert."""


class CopyMethod(Enum):
    """How a tensor is taken."""

    WHOLE = "copied"
    """All of it, into a tensor of the same shape."""
    ROWS = "copied into the first experts"
    """A stack of experts, or a gate, into one with more of them."""
    NETWORK = "copied into each expert"
    """A matrix of a dense network, into a stack of experts."""


@dataclass(frozen=True, kw_only=True)
class TensorCopy:
    """One tensor of the child that has values of the parent."""

    target: str
    source: str
    way: CopyMethod


@dataclass(frozen=True, kw_only=True)
class LoadPlan:
    """What a child takes."""

    taken: tuple[TensorCopy, ...]
    new: tuple[str, ...]
    """Tensors of the child that keep their own initial values."""
    unused: tuple[str, ...]
    """Tensors of the parent that the child does not take."""
    zeroed: tuple[str, ...] = ()
    """Gates of the child that are set to 0."""

    def of(self, way: CopyMethod) -> list[TensorCopy]:
        """Return what is taken in one way."""
        return [each for each in self.taken if each.way is way]


Shapes = Mapping[str, torch.Size]


@dataclass(frozen=True, kw_only=True)
class Matcher:
    """Finds for each tensor of a child what it takes from a parent."""

    config: CellConfig
    parent: str
    """Label of the parent, for messages."""
    settings: Mapping[str, Any]
    child_shapes: Shapes
    parent_shapes: Shapes
    copies_router: bool = field(default=False)

    def match(self, name: str) -> TensorCopy | None:
        """Return how a tensor is taken, None where it is not; raise UsageError for a shape that does not fit."""
        if ROUTER in name:
            return self._match_router(name) if self.copies_router else None
        source = name if name in self.parent_shapes else self._find_network(name)
        if source is None:
            return None
        shape, bank = self.child_shapes[name], BANK.fullmatch(name)
        offered = self.parent_shapes[source]
        if shape == offered:
            return TensorCopy(target=name, source=source, way=CopyMethod.WHOLE)
        if bank and source != name and shape[1:] == offered:
            return TensorCopy(target=name, source=source, way=CopyMethod.NETWORK)
        if bank and source == name and shape[1:] == offered[1:] and shape[0] > offered[0]:
            return TensorCopy(target=name, source=source, way=CopyMethod.ROWS)
        raise self._refuse(name, source)

    def _match_router(self, name: str) -> TensorCopy | None:
        offered, shape = self.parent_shapes.get(name), self.child_shapes[name]
        if offered == shape:
            return TensorCopy(target=name, source=name, way=CopyMethod.WHOLE)
        if offered and BY_EXPERT.fullmatch(name) and shape[1:] == offered[1:] and shape[0] > offered[0]:
            return TensorCopy(target=name, source=name, way=CopyMethod.ROWS)
        if offered is None or self.config.init.upcycle.router == "auto":
            return None
        raise self._refuse(name, name)

    def _find_network(self, name: str) -> str | None:
        """Return the parent's dense weight that a weight of an expert or of a shared network is a copy of."""
        bank, shared = BANK.fullmatch(name), SHARED.fullmatch(name)
        if bank:
            source = f"{bank['layer']}.{DENSE_NAMES[bank['weight']]}"
        elif shared:
            source = f"{shared['layer']}.{shared['weight']}"
        else:
            return None
        return source if source in self.parent_shapes else None

    def _refuse(self, name: str, source: str) -> UsageError:
        shape, offered = list(self.child_shapes[name]), list(self.parent_shapes[source])
        what = f"init.from: {source} of {self.parent} has the shape {offered}"
        if BANK.fullmatch(name) and source != name:
            return UsageError(
                f"{what}, and an expert here {shape[1:]} (allowed: the width of the parent's feed-forward network,"
                " layout.match=none)"
            )
        if BANK.fullmatch(name) and shape[0] < offered[0]:
            return UsageError(f"{what}: layout.num_experts must be at least {offered[0]}, got {shape[0]}")
        return UsageError(f"{what}, here {shape}: {self._name_difference()}")

    def _name_difference(self) -> str:
        """Return the keys in which the model and the layout of both differ, with their values."""
        from moebench.config import flatten, to_plain

        plain = to_plain(self.config)
        differences = [
            f"{key} is {theirs.get(key)} there and {value} here"
            for section in ("model", "layout", "router")
            for theirs in (dict(flatten(self.settings.get(section) or {}, f"{section}.")),)
            for key, value in flatten(plain[section], f"{section}.")
            if theirs.get(key) != value
        ]
        return "; ".join(differences[:3]) or "the two tasks differ"


def plan_load(config: CellConfig, child_shapes: Shapes, parent: Any) -> LoadPlan:
    """Return what a child with these tensors takes from a parent (`ParentWeights`).

    Raises UsageError where a tensor does not fit, where nothing does, and where settings contradict each other.
    """
    matcher = Matcher(
        config=config,
        parent=parent.label,
        settings=parent.settings,
        child_shapes=child_shapes,
        parent_shapes=parent.shapes,
        copies_router=_copies_router(config, child_shapes, parent),
    )
    matches = {name: matcher.match(name) for name in child_shapes}
    taken = tuple(match for match in matches.values() if match is not None)
    if not taken:
        raise UsageError(
            f"init.from: the model takes nothing from {parent.label}: no weight of the two has the same name"
        )
    used = {each.source for each in taken}
    return LoadPlan(
        taken=taken,
        new=tuple(name for name, match in matches.items() if match is None),
        unused=tuple(name for name in parent.shapes if name not in used),
        zeroed=tuple(_list_zeroed(config, child_shapes)),
    )


def _copies_router(config: CellConfig, child_shapes: Shapes, parent: Any) -> bool:
    """Return whether routers take the parent's weights and state; raise UsageError where they must and cannot."""
    choice = config.init.upcycle.router
    if choice == "copy":
        ours = [name for name in child_shapes if ROUTER in name]
        missing = next((name for name in ours if name not in parent.shapes), None)
        if missing or not ours:
            lacking = f"{parent.label} has no {missing}" if missing else f"router '{config.router.name}' has no weights"
            raise UsageError(f"init.upcycle.router: copy, but {lacking} (allowed: auto, random)")
        return True
    name = (parent.settings.get("router") or {}).get("name")
    return choice == "auto" and (name == config.router.name or computes_same(config.router, parent.routing))


def _list_zeroed(config: CellConfig, child_shapes: Shapes) -> Iterator[str]:
    """Yield the gates that are set to 0; raise UsageError where a router has none."""
    if config.init.upcycle.router != "zero":
        return
    gates = [name for name in child_shapes if GATE.fullmatch(name)]
    if not gates:
        raise UsageError(f"init.upcycle.router: zero, but router '{config.router.name}' has no gate (allowed: random)")
    yield from gates
