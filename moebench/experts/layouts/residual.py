"""A dense network plus the correction of one expert: the residual of PR-MoE."""

from dataclasses import dataclass

from typing_extensions import override

from moebench.experts.layout import LAYOUTS, BlockPlan, BlocksConfig, Experts, Layout, LayoutFacts, place_experts


@LAYOUTS.register(
    LayoutFacts(
        placement="all blocks, or those in `blocks`",
        paper="arXiv:2201.05596, section 4.1",
        experts="feed-forward networks beside a dense one of their width, mixed by a softmax",
    )
)
class Residual(Layout):
    """PR-MoE's residual: y = c_0 · MoE(x) + c_1 · MLP(x), c = softmax(x W_c + b).

    W_c and b are those of its implementation, DeepSpeed. A top-1 router costs as much as top-2 without this layout,
    with an all-to-all of half the size; a dropped token still has the dense network.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(BlocksConfig):
        """Options of residual."""

        name: str = "residual"

    @staticmethod
    @override
    def plan(config: Config, num_layers: int) -> tuple[BlockPlan, ...]:
        experts = Experts(shapes=config.shapes, shared=1.0, residual=True)
        return place_experts(config.block_indices(num_layers), num_layers, experts)
