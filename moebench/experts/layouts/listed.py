"""Block by block: which hold experts, how many, how wide, how deep."""

from dataclasses import dataclass, field

from typing_extensions import override

from moebench.errors import require
from moebench.experts.layout import (
    LAYOUTS,
    BlockPlan,
    Experts,
    ExpertShape,
    Layout,
    LayoutConfig,
    LayoutFacts,
    check_blocks,
)


@dataclass(frozen=True, kw_only=True)
class ListedBlock:
    """One block with experts."""

    block: int
    """Index of the block, from 0."""
    num_experts: int | None = None
    """null is the layout's."""
    expert_width: int | None = None
    """null is the layout's, or matched."""
    depth: int | None = None
    """null is the layout's."""

    def __post_init__(self) -> None:
        """Refuse sizes below 1."""
        for key in ("num_experts", "expert_width", "depth"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"layout.blocks: {key}", value, "at least 1 or null")


@LAYOUTS.register(LayoutFacts(placement="the blocks that the configuration lists", paper="arXiv:2209.01667 (survey)"))
class Listed(Layout):
    """An explicit list: blocks: [{block: 1, num_experts: 8, expert_width: 64, depth: 1}, ...]."""

    @dataclass(frozen=True, kw_only=True)
    class Config(LayoutConfig):
        """Options of listed."""

        name: str = "listed"
        blocks: list[ListedBlock] = field(default_factory=lambda: [ListedBlock(block=1)])
        """The blocks with experts, each with the keys block, num_experts, expert_width and depth; the layout's values
        are used for missing keys."""

    @staticmethod
    @override
    def plan(config: Config, num_layers: int) -> tuple[BlockPlan, ...]:
        check_blocks([entry.block for entry in config.blocks], num_layers)
        plan = [BlockPlan()] * num_layers
        for entry in config.blocks:
            shape = ExpertShape(depth=entry.depth or config.depth)
            shapes = (shape,) * (entry.num_experts or config.num_experts)
            plan[entry.block] = BlockPlan(feed_forward=Experts(shapes=shapes, unit=entry.expert_width))
        return tuple(plan)
