"""Experts in the projections of attention."""

from dataclasses import dataclass
from typing import Literal

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
        paper="arXiv:2101.03961, appendix A",
        experts="linear maps to the query and to a shared key and value; optionally feed-forward networks beside them",
    )
)
class AttentionExperts(Layout):
    """Switch in attention: a token's query, key and value come from the expert it is sent to.

    An expert has two maps, as in the paper: one for the query, the other for the key, which is the value too. Here each
    token has one choice of experts per block for both maps, weighted by the router, and experts are linear; the paper
    tries feed-forward networks too. It found attention with experts better, and unstable in bfloat16. The width of the
    feed-forward part makes up for the difference in cost between experts with their router and the dense maps.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(BlocksConfig):
        """Options of attention."""

        name: str = "attention"
        keys_values: Literal["shared", "apart"] = "shared"
        """Maps of an expert to keys and values. shared: one map for both (the paper); apart: one map for each."""
        feed_forward: Literal["dense", "experts"] = "dense"
        """The other half of the block: dense, or num_experts experts behind its own router."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.feed_forward == "dense":
                self.require_depth_1("with feed_forward=dense no expert is a network")

    @staticmethod
    @override
    def plan(config: Config, num_layers: int) -> tuple[BlockPlan, ...]:
        shape = ExpertShape(kind="shared_projection" if config.keys_values == "shared" else "projection")
        plan = BlockPlan(
            attention=Experts(shapes=(shape,) * config.num_experts),
            feed_forward=Experts(shapes=config.shapes) if config.feed_forward == "experts" else None,
        )
        return place_experts(config.block_indices(num_layers), num_layers, plan)
