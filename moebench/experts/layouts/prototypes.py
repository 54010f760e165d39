"""k groups of experts, each with its own router, the outputs added."""

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
        paper="arXiv:2105.15082 (M6-T)",
        experts="feed-forward networks in groups, each with its own router; every group serves every token",
    )
)
class Prototypes(Layout):
    """M6-T's expert prototyping, k top-1: each token has one expert in every group, y = Σ_g w_g E_g(x).

    It uses as many experts per token as top-k, without the loop over choices and without second choices that queue
    behind other tokens' first ones, so it is causal with a capacity. A fixed function of the token (hash, oracle,
    domain) differs between groups, so that tokens that share an expert in one group are separated in the others.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(BlocksConfig):
        """Options of prototypes."""

        name: str = "prototypes"
        groups: int = 2
        """Number of groups that num_experts is divided into, and of experts per token (k in the paper)."""

        def __post_init__(self) -> None:
            super().__post_init__()
            check_groups(self.groups, self.num_experts)

    @staticmethod
    @override
    def plan(config: Config, num_layers: int) -> tuple[BlockPlan, ...]:
        return place_experts(
            config.block_indices(num_layers), num_layers, Experts(shapes=config.shapes, groups=config.groups)
        )
