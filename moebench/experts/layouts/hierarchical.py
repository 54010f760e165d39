"""Two levels: a router picks groups, the router of each group picks experts."""

from dataclasses import dataclass

from typing_extensions import override

from moebench.experts.layout import (
    LAYOUTS,
    BlockPlan,
    BlocksConfig,
    Experts,
    Layout,
    LayoutFacts,
    check_groups,
    place_experts,
)


@LAYOUTS.register(
    LayoutFacts(
        placement="all blocks, or those in `blocks`",
        paper="arXiv:1701.06538, appendix B",
        experts="feed-forward networks in groups, each with its own router, and a router above",
    )
)
class Hierarchical(Layout):
    """Hierarchical experts: y = Σ_g w_g Σ_e w_e|g E_ge(x). The router is the same algorithm on both levels.

    With top_k=2 a token gets two groups and two experts in each: four experts, each of half the width. A fixed function
    of the token (hash, oracle, domain) is one function over all experts: it determines the group and the expert in it.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(BlocksConfig):
        """Options of hierarchical."""

        name: str = "hierarchical"
        groups: int = 4
        """Groups that num_experts is divided into."""

        def __post_init__(self) -> None:
            super().__post_init__()
            check_groups(self.groups, self.num_experts)

    @staticmethod
    @override
    def plan(config: Config, num_layers: int) -> tuple[BlockPlan, ...]:
        experts = Experts(shapes=config.shapes, groups=config.groups, pick_groups=config.groups > 1)
        return place_experts(config.block_indices(num_layers), num_layers, experts)
