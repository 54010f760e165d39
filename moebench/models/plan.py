"""The plan of a model: what each of its blocks contains."""

from typing import Literal

from moebench.compatibility import MODEL_RULES, Combination
from moebench.experts.layout import BlockPlan
from moebench.schema import CellConfig

Half = Literal["encoder", "decoder"]
"""One of the two backbones of an encoder-decoder model."""


def plan_blocks(config: CellConfig) -> tuple[BlockPlan, ...]:
    """Return the plan of each block, from the bottom; all dense for a dense router.

    Raises UsageError when layout, router and their options are incompatible, or a loss is unknown.
    """
    combination = Combination.of(config)
    combination.check(MODEL_RULES)
    return combination.blocks


def plan_backbone(config: CellConfig, half: Half | None) -> tuple[BlockPlan, ...]:
    """Return the plan of each block of one backbone; all dense where `layout.experts_in` names the other half."""
    blocks = plan_blocks(config)
    has_experts = half is None or config.layout.experts_in in ("both", half)
    return blocks if has_experts else (BlockPlan(),) * len(blocks)
