"""The last n blocks, or the last n of every second one, hold experts: the top of the model."""

from dataclasses import dataclass

from typing_extensions import override

from moebench.errors import require
from moebench.experts.layout import LAYOUTS, BlockPlan, Experts, Layout, LayoutConfig, LayoutFacts, place_experts


@LAYOUTS.register(
    LayoutFacts(
        placement="the last n of blocks s-1, 2s-1, ... counted from 0, s the stride: with 1 the last n blocks",
        paper="arXiv:2106.05974 (V-MoE, last-n: stride 2)",
    )
)
class LastN(Layout):
    """Experts at the top, where blocks route by the meaning of a token rather than by its identity.

    V-MoE's last-n has stride 2, the last n of every second block: of 12 blocks 9 and 11 for n=2. Where the stride does
    not divide the number of blocks, those above its last multiple are dense.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(LayoutConfig):
        """Options of last_n."""

        name: str = "last_n"
        n: int = 1
        """Number of blocks with experts."""
        stride: int = 1
        """Distance between blocks with experts; 2 is V-MoE's."""

        def __post_init__(self) -> None:
            super().__post_init__()
            require(self.stride >= 1, "layout.stride", self.stride, "at least 1")

    @staticmethod
    @override
    def plan(config: Config, num_layers: int) -> tuple[BlockPlan, ...]:
        fits = config.stride <= num_layers
        require(fits, "layout.stride", config.stride, f"from 1 to model.num_layers={num_layers}")
        candidates = range(config.stride - 1, num_layers, config.stride)
        allowed = f"from 1 to {len(candidates)} (model.num_layers={num_layers}, layout.stride={config.stride})"
        require(1 <= config.n <= len(candidates), "layout.n", config.n, allowed)
        return place_experts(candidates[-config.n :], num_layers, Experts(shapes=config.shapes))
