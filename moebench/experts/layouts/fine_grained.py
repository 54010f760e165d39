"""Many small experts instead of few large ones, and shared experts beside them."""

from dataclasses import dataclass

from moebench.errors import require
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
        paper="arXiv:2401.06066, sections 3.1 and 3.2",
        experts="split times as many, each 1/split as wide, split times as many per token; and shared experts",
    )
)
class FineGrained(Layout):
    """DeepSeekMoE: a token combines m·k small experts instead of k large ones, of the same width together.

    The router's top_k counts coarse experts: it is multiplied by `split`. The paper takes the shared experts out of
    the m·k; here they come on top, and matching makes all experts narrower for it.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(BlocksConfig):
        """Options of fine_grained."""

        name: str = "fine_grained"
        split: int = 4
        """Small experts made of one, m in the paper; 1 leaves them whole."""
        shared: int = 1
        """Small experts that every token uses besides."""

        def __post_init__(self) -> None:
            """Refuse numbers out of range."""
            super().__post_init__()
            require(self.split >= 1, "layout.split", self.split, "at least 1")
            require(self.shared >= 0, "layout.shared", self.shared, "at least 0")

    @staticmethod
    def plan(config: Config, num_layers: int) -> tuple[BlockPlan, ...]:
        """Split the experts of each bank."""
        experts = Experts(
            shapes=(ExpertShape(depth=config.depth),) * (config.num_experts * config.split),
            # Shared experts of one width are one network of their width together.
            shared=config.shared,
            top_k_factor=config.split,
        )
        return place_experts(config.chosen(num_layers), num_layers, experts)
