"""Which parent each expert is of: by the domains that both are for, where there are any, else in the order given."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from moebench.errors import UsageError, require
from moebench.routing.routers.domain import Domain
from moebench.schema import CellConfig


def assign_parents(
    config: CellConfig, settings: Sequence[Mapping[str, Any]], expert_domains: Sequence[str] = ()
) -> list[int]:
    """Return for each expert of a cell the index of its parent.

    `settings`: those of the parents. With `expert_domains`, names whose number modulo the experts is the expert of each
    domain, an expert is of the one parent that was trained on all its domains - except where every parent was trained
    on all of them: then, and without domains, expert e is of parent e modulo the parents. Raises UsageError for a
    number of experts that is no multiple of the parents, and for an expert whose parent is not clear.
    """
    num_experts, num_parents = config.layout.num_experts, len(settings)
    divides = num_experts % num_parents == 0
    require(divides, "layout.num_experts", num_experts, f"a multiple of the {num_parents} parents of init.from")
    held_out = [_list_held_out(each) for each in settings]
    in_order = [expert % num_parents for expert in range(num_experts)]
    if not any(held & set(expert_domains) for held in held_out):
        return in_order
    return [_find_parent(expert, num_experts, expert_domains, held_out) for expert in range(num_experts)]


def _find_parent(expert: int, num_experts: int, domains: Sequence[str], held_out: Sequence[set[str]]) -> int:
    of_expert = {domain for number, domain in enumerate(domains) if number % num_experts == expert}
    fitting = [index for index, held in enumerate(held_out) if not of_expert & held]
    if len(fitting) != 1:
        names = ", ".join(sorted(of_expert)) or "no domain"
        raise UsageError(
            f"init.combine: expert {expert} is that of {names}, on which {len(fitting)} parents were trained (allowed:"
            " one; router.domains sets the order of domains, task.data.held_out_domains those of a parent)"
        )
    return fitting[0]


def _list_held_out(settings: Mapping[str, Any]) -> set[str]:
    data = (settings.get("task") or {}).get("data") or {}
    return set(data.get("held_out_domains") or ())


def find_domain_router(model: nn.Module) -> Domain | None:
    """Return a router of the model that has an expert for each domain; None for other routers."""
    return next((module for module in model.modules() if isinstance(module, Domain)), None)
