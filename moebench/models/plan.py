"""Plan the blocks of a model, and check that router and layout fit each other."""

import math
from typing import Literal

from moebench.errors import UsageError, unknown
from moebench.experts.assembly import RouterPlan
from moebench.experts.layout import LAYOUTS, BlockPlan
from moebench.routing.losses import LOSSES
from moebench.routing.router import ROUTERS
from moebench.schema import CellConfig

Half = Literal["encoder", "decoder"]
"""Which backbone of a model that has two."""


def plan_blocks(config: CellConfig) -> tuple[BlockPlan, ...]:
    """Return what each block is; all dense for a dense router.

    Raises UsageError when layout, router and their options do not fit each other, or a loss is unknown.
    """
    plan: tuple[BlockPlan, ...] = LAYOUTS.get(config.layout.name).item.plan(config.layout, config.model.num_layers)
    total, match = config.layout.total_params, config.layout.match
    if total != 1.0 and match != "params":
        raise UsageError(f"layout.total_params={total:g} needs layout.match=params, got {match}")
    _check_kinds(config, plan)
    for block in plan:
        for experts in block.banks:
            RouterPlan.of(config.router, experts)
    entry = ROUTERS.get(config.router.name, where="router.name")
    known = {*LOSSES.names(), *entry.facts.own_losses}
    for loss, coefficient in config.router.losses.items():
        if loss not in known:
            raise unknown("router.losses", loss, known)
        if not coefficient >= 0:
            raise UsageError(f"router.losses.{loss} must be at least 0, got {coefficient}")
    return (BlockPlan(),) * config.model.num_layers if entry.item.form.is_dense else plan


def plan_backbone(config: CellConfig, half: Half | None) -> tuple[BlockPlan, ...]:
    """Return what each block of one backbone is; all dense where `layout.experts_in` names the other half."""
    plans = plan_blocks(config)
    with_experts = half is None or config.layout.experts_in in ("both", half)
    return plans if with_experts else (BlockPlan(),) * len(plans)


def _check_kinds(config: CellConfig, plan: tuple[BlockPlan, ...]) -> None:
    """Refuse what experts that are not feed-forward networks behind one router cannot do."""
    router, layout = ROUTERS.get(config.router.name, where="router.name").item, config.layout
    if router.form.is_dense:
        return
    special = any(block.attention or block.stack for block in plan)
    banks = [bank for block in plan for bank in block.banks]
    if router.form.is_merged and (special or any(bank.groups > 1 or not bank.can_merge for bank in banks)):
        raise UsageError(
            f"router.name: '{config.router.name}' sums the parameters of experts, and those of layout '{layout.name}'"
            " are not feed-forward networks of one shape in one group (allowed: another router or another layout)"
        )
    if router.form.is_mixture and (special or any(bank.groups > 1 for bank in banks)):
        raise UsageError(
            f"router.name: '{config.router.name}' mixes tokens into slots, and layout '{layout.name}' needs to know"
            " where each token goes (allowed: another router, or a layout of feed-forward experts in one group)"
        )
    if router.form.is_chain:
        _check_chain(config, plan)
    if special and layout.overflow == "pass":
        raise UsageError(f"layout.overflow: 'pass' has no meaning in layout '{layout.name}' (allowed: drop, reroute)")
    if special and layout.expert_dropout > 0:
        raise UsageError(f"layout.expert_dropout must be 0 in layout '{layout.name}', got {layout.expert_dropout:g}")


def _check_chain(config: CellConfig, plan: tuple[BlockPlan, ...]) -> None:
    """Refuse a chain of experts where they cannot stand one behind another, or where one could be left out."""
    name, layout = config.router.name, config.layout
    if any(block.attention or block.stack or bank.groups > 1 for block in plan for bank in block.banks):
        raise UsageError(
            f"router.name: '{name}' sends tokens through one expert after another, and in layout '{layout.name}' they"
            " stand side by side (allowed: another router, or a layout of feed-forward experts in one group)"
        )
    for key in ("capacity_factor_train", "capacity_factor_eval"):
        factor = getattr(layout, key)
        if factor is not None and not math.isinf(factor):
            raise UsageError(f"layout.{key} must be null with router '{name}', got {factor:g}: no step can be left out")
