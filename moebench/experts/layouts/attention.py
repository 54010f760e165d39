"""Experts in the projections of attention."""

from dataclasses import dataclass
from typing import Literal

from moebench.experts.layout import LAYOUTS, BlockPlan, BlocksConfig, Experts, ExpertShape, Layout, LayoutFacts, placed


@LAYOUTS.register(
    LayoutFacts(
        placement="all blocks, or those in `blocks`",
        paper="arXiv:2101.03961, appendix A",
        experts="linear maps to query, key and value; feed-forward networks beside them if asked for",
    )
)
class AttentionExperts(Layout):
    """Switch in attention: a token's query, key and value come from the expert it is sent to.

    One choice of experts per token and block for all three, weighted as the router says. The paper found it better
    and unstable in bfloat16. Router and second experts cost FLOPs: the feed-forward part gets narrower for them.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(BlocksConfig):
        """Options of attention."""

        name: str = "attention"
        feed_forward: Literal["dense", "experts"] = "dense"
        """The other half of the block: dense, or num_experts experts behind a router of its own."""

        def __post_init__(self) -> None:
            """Refuse a depth without feed-forward experts."""
            super().__post_init__()
            if self.feed_forward == "dense":
                self.without_depth("with feed_forward=dense no expert is a network")

    @staticmethod
    def plan(config: Config, num_layers: int) -> tuple[BlockPlan, ...]:
        """Put experts into the attention, and beside it if asked for."""
        plan = BlockPlan(
            attention=Experts(shapes=(ExpertShape(kind="projection"),) * config.num_experts),
            feed_forward=Experts(shapes=config.shapes) if config.feed_forward == "experts" else None,
        )
        return placed(config.chosen(num_layers), num_layers, plan)
