"""Experts that differ in width and depth."""

from dataclasses import dataclass, field

from typing_extensions import override

from moebench.errors import UsageError
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
        paper="arXiv:2408.10681 (HMoE), arXiv:2209.01667 (the survey's conjecture)",
        experts="feed-forward networks of several widths and depths",
    )
)
class Heterogeneous(Layout):
    """Experts of several sizes: hard tokens can have a large one, easy tokens a small one.

    Experts take `widths` and `depths` in turn. Arms are matched at an even load:
    a router that prefers large experts spends more, one that prefers small ones less. HMoE trains with a penalty on
    large experts in place of the balance loss (coefficient 0.1): `router.losses={parameter_penalty: 0.1}`; without it
    the router's own losses apply, which push towards equal use of all experts.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(BlocksConfig):
        """Options of heterogeneous."""

        name: str = "heterogeneous"
        widths: list[float] = field(default_factory=lambda: [0.5, 1.0, 1.5])
        """Relative widths of experts, taken in turn; the mean cost is matched."""
        depths: list[int] = field(default_factory=lambda: [1])
        """Numbers of networks in sequence in an expert, taken in turn."""

        def __post_init__(self) -> None:
            super().__post_init__()
            self.require_depth_1("`depths` sets it")
            for key, values in (("widths", self.widths), ("depths", self.depths)):
                if not values or not all(0 < value < float("inf") for value in values):
                    raise UsageError(f"layout.{key} must be a list of numbers greater than 0, got {values}")
            for key, values in (("widths", self.widths), ("depths", self.depths)):
                if len(values) > self.num_experts:
                    raise UsageError(
                        f"layout.{key} names {len(values)} sizes for layout.num_experts={self.num_experts}"
                        f" (allowed: 1 to {self.num_experts})"
                    )

    @staticmethod
    @override
    def plan(config: Config, num_layers: int) -> tuple[BlockPlan, ...]:
        sizes = sorted(
            (config.widths[expert % len(config.widths)], config.depths[expert % len(config.depths)])
            for expert in range(config.num_experts)
        )
        shapes = tuple(ExpertShape(width=width, depth=depth) for width, depth in sizes)
        return place_experts(config.block_indices(num_layers), num_layers, Experts(shapes=shapes))
