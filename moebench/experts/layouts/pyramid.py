"""More experts further up: the pyramid of PR-MoE."""

from dataclasses import dataclass

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
        """Experts in a top block, over those in a lower one."""
        top: int | None = None
        """How many of the blocks with experts are top ones; null is half of them, at least one."""

        def __post_init__(self) -> None:
            """Refuse numbers below 1."""
            super().__post_init__()
            require(self.factor >= 1, "layout.factor", self.factor, "at least 1")

    @staticmethod
    def plan(config: Config, num_layers: int) -> tuple[BlockPlan, ...]:
        """Give the top blocks more experts."""
        blocks = config.chosen(num_layers)
        top = max(len(blocks) // 2, 1) if config.top is None else config.top
        require(0 <= top <= len(blocks), "layout.top", top, f"from 0 to the {len(blocks)} blocks with experts")
        plan = [BlockPlan()] * num_layers
        for place, block in enumerate(blocks):
            number = config.num_experts * (config.factor if place >= len(blocks) - top else 1)
            plan[block] = BlockPlan(feed_forward=Experts(shapes=(ExpertShape(depth=config.depth),) * number))
        return tuple(plan)
