"""A dense network that one expert corrects: the residual of PR-MoE."""

from dataclasses import dataclass

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

    W_c and b are those of its implementation, DeepSpeed. A top-1 router costs what top-2 costs without this layout,
    with one all-to-all of half the size; a token that its expert drops still has the network.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(BlocksConfig):
        """Options of residual."""

        name: str = "residual"

    @staticmethod
    def plan(config: Config, num_layers: int) -> tuple[BlockPlan, ...]:
        """Put a network of an expert's width beside each bank."""
        experts = Experts(shapes=config.shapes, shared=1.0, residual=True)
        return place_experts(config.chosen(num_layers), num_layers, experts)
