"""Every n-th block holds experts, the others are dense."""

from dataclasses import dataclass

from typing_extensions import override

from moebench.errors import UsageError, require
from moebench.experts.layout import LAYOUTS, BlockPlan, Experts, Layout, LayoutConfig, LayoutFacts, place_experts


@LAYOUTS.register(
    LayoutFacts(
        placement="blocks n-1, 2n-1, ... counted from 0: the last of each n",
        paper="arXiv:2006.16668 (every second), arXiv:2202.08906 (every fourth)",
    )
)
class EveryN(Layout):
    """Experts in every n-th block; n=1 puts them everywhere."""

    @dataclass(frozen=True, kw_only=True)
    class Config(LayoutConfig):
        """Options of every_n."""

        name: str = "every_n"
        n: int = 1
        """Distance between blocks with experts."""

        def __post_init__(self) -> None:
            super().__post_init__()
            require(self.n >= 1, "layout.n", self.n, "at least 1")

    @staticmethod
    @override
    def plan(config: Config, num_layers: int) -> tuple[BlockPlan, ...]:
        if config.n > num_layers:
            raise UsageError(f"layout.n={config.n} leaves no block with experts: model.num_layers={num_layers}")
        return place_experts(range(config.n - 1, num_layers, config.n), num_layers, Experts(shapes=config.shapes))
