"""Experts of domains in a child and its parent: matched by the names of the domains, never by their numbers."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from moebench.errors import UsageError
from moebench.schema import CellConfig
from moebench.training.initial_weights.parent import ParentWeights
from moebench.training.initial_weights.plan import BANK, BY_EXPERT
from moebench.training.initial_weights.stacks import copy_experts

BY_DOMAIN = ("domain", "domain_posterior")
"""Routers whose experts are those of domains."""


def select_expert_domains(
    config: CellConfig, parent: ParentWeights, domains: Sequence[str], known: Collection[str]
) -> ParentWeights:
    """Return the parent with the experts of the child's domains, in the child's order; others are left out.

    `domains`: of the child, in the order of its experts; those that the parent lacks come last. `known`: all domains of
    its data. A parent or child with another router is returned as it is. Raises UsageError where a domain cannot have
    the same expert in both.
    """
    router = parent.settings.get("router") or {}
    if config.router.name not in BY_DOMAIN or router.get("name") not in BY_DOMAIN or not domains:
        return parent
    theirs = _list_domains(parent.settings, known)
    if list(domains) == theirs:
        return parent
    kept = [domain for domain in domains if domain in theirs]
    has_one_each = (parent.settings.get("layout") or {}).get("num_experts") == len(theirs)
    fits = kept and list(domains[: len(kept)]) == kept and config.layout.num_experts >= len(domains)
    if not (has_one_each and fits):
        raise UsageError(
            f"router.domains: the experts here are those of {', '.join(domains)}, and {parent.label} has those of"
            f" {', '.join(theirs)} (allowed: some or all of these, then new ones, with one expert for each)"
        )
    return parent if kept == theirs else SelectedExperts(parent, [theirs.index(domain) for domain in kept])


def _list_domains(settings: Mapping[str, Any], known: Collection[str]) -> list[str]:
    """Return the domains of a parent in the order of its experts."""
    held_out = ((settings.get("task") or {}).get("data") or {}).get("held_out_domains") or ()
    return list((settings.get("router") or {}).get("domains") or sorted(set(known) - set(held_out)))


class SelectedExperts(ParentWeights):
    """A parent with some of its experts, in another order: of stacks, and of routers with a row for each expert."""

    def __init__(self, parent: ParentWeights, experts: Sequence[int]) -> None:
        self.parent = parent
        self.experts = tuple(experts)
        self.label = f"{parent.label}, experts {', '.join(map(str, experts))}"
        self.settings = parent.settings
        self.shapes = {name: self._select(name, shape) for name, shape in parent.shapes.items()}

    def _select(self, name: str, shape: torch.Size) -> torch.Size:
        return torch.Size([len(self.experts), *shape[1:]]) if _has_experts(name) else shape

    @override
    def load(self, targets: Mapping[str, Tensor]) -> None:
        stacks = {name: target for name, target in targets.items() if _has_experts(name)}
        rows = {name: torch.empty(self.parent.shapes[name], dtype=target.dtype) for name, target in stacks.items()}
        self.parent.load({**{name: value for name, value in targets.items() if name not in stacks}, **rows})
        for name, target in stacks.items():
            copy_experts(target, {place: rows[name][expert] for place, expert in enumerate(self.experts)})


def _has_experts(name: str) -> bool:
    return bool(BANK.fullmatch(name) or BY_EXPERT.fullmatch(name))
