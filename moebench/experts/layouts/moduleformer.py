"""Experts that are attention heads, beside experts that are feed-forward networks."""

from dataclasses import dataclass

from typing_extensions import override

from moebench.experts.layout import (
    LAYOUTS,
    BlockPlan,
    BlocksConfig,
    Experts,
    ExpertShape,
    Layout,
    LayoutFacts,
    place_experts,
)


@LAYOUTS.register(
    LayoutFacts(
        placement="all blocks, or those in `blocks`",
        paper="arXiv:2306.04640 (ModuleFormer), arXiv:2210.05144 (mixture of attention heads)",
        experts="attention heads (query and output each, keys and values shared), and feed-forward networks",
    )
)
class ModuleFormer(Layout):
    """Both halves of a block are experts: num_experts attention heads and num_experts networks, a router each.

    All heads of a bank share keys and values, so a token's choice changes its queries, not what others attend to. The
    paper's attention is stick-breaking, which needs no positions; here it is softmax with rotary positions, as in every
    other arm. An expert has model.num_heads / k heads: as many are in use as in dense attention.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(BlocksConfig):
        """Options of moduleformer."""

        name: str = "moduleformer"

    @staticmethod
    @override
    def plan(config: Config, num_layers: int) -> tuple[BlockPlan, ...]:
        heads = Experts(shapes=(ExpertShape(kind="head"),) * config.num_experts)
        plan = BlockPlan(attention=heads, feed_forward=Experts(shapes=config.shapes))
        return place_experts(config.block_indices(num_layers), num_layers, plan)
