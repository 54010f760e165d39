"""More experts further up: the pyramid of PR-MoE."""

from dataclasses import dataclass

from typing_extensions import override

from moebench.components import MAX_EXPERTS
from moebench.errors import require
from moebench.experts.layout import LAYOUTS, BlockPlan, BlocksConfig, Experts, ExpertShape, Layout, LayoutFacts


@LAYOUTS.register(
    LayoutFacts(
        placement="all blocks, or those in `blocks`",
        paper="arXiv:2201.05596, section 4.1",
        experts="num_experts below, factor times as many at the top",
    )
)
class Pyramid(Layout):
    """PR-MoE's pyramid: the top blocks have more experts, because experts help most there."""

    @dataclass(frozen=True, kw_only=True)
    class Config(BlocksConfig):
        """Options of pyramid."""

        name: str = "pyramid"
        factor: int = 2
        """Ratio of the number of experts in a top block to that in a lower one."""
        top: int | None = None
        """Number of blocks at the top, among those with experts, that have more of them; null: half of them, at least
        one."""

        def __post_init__(self) -> None:
            super().__post_init__()
            most = MAX_EXPERTS // self.num_experts
            require(1 <= self.factor <= most, "layout.factor", self.factor, f"between 1 and {most}")

    @staticmethod
    @override
    def plan(config: Config, num_layers: int) -> tuple[BlockPlan, ...]:
        blocks = config.block_indices(num_layers)
        top = max(len(blocks) // 2, 1) if config.top is None else config.top
        require(0 <= top <= len(blocks), "layout.top", top, f"from 0 to the {len(blocks)} blocks with experts")
        plan = [BlockPlan()] * num_layers
        for index, block in enumerate(blocks):
            number = config.num_experts * (config.factor if index >= len(blocks) - top else 1)
            plan[block] = BlockPlan(feed_forward=Experts(shapes=(ExpertShape(depth=config.depth),) * number))
        return tuple(plan)
