"""Many small experts instead of a few large ones, and shared experts beside them."""

from dataclasses import dataclass

from typing_extensions import override

from moebench.components import MAX_EXPERTS
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

    The router's top_k counts coarse experts: it is multiplied by `split`. The paper counts the shared experts among
    the m·k; here they come on top, and matching makes all experts narrower instead.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(BlocksConfig):
        """Options of fine_grained."""

        name: str = "fine_grained"
        split: int = 4
        """Small experts that each expert is split into, m in the paper; 1: no split."""
        shared: int = 1
        """Small experts that every token uses in addition."""

        def __post_init__(self) -> None:
            super().__post_init__()
            require(self.split >= 1, "layout.split", self.split, "at least 1")
            most = MAX_EXPERTS // self.num_experts
            require(self.split <= most, "layout.split", self.split, f"at most {most} with {self.num_experts} experts")
            require(0 <= self.shared <= MAX_EXPERTS, "layout.shared", self.shared, f"between 0 and {MAX_EXPERTS}")

    @staticmethod
    @override
    def plan(config: Config, num_layers: int) -> tuple[BlockPlan, ...]:
        experts = Experts(
            shapes=(ExpertShape(depth=config.depth),) * (config.num_experts * config.split),
            # Shared experts of one width are one network of their width together.
            shared=config.shared,
            top_k_factor=config.split,
        )
        return place_experts(config.block_indices(num_layers), num_layers, experts)
