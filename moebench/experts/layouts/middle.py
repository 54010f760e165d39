"""The middle blocks hold experts."""

from dataclasses import dataclass

from typing_extensions import override

from moebench.experts.layout import (
    LAYOUTS,
    BlockPlan,
    Experts,
    Layout,
    LayoutConfig,
    LayoutFacts,
    check_count,
    place_experts,
)


@LAYOUTS.register(
    LayoutFacts(
        placement="the n blocks in the middle",
        paper="arXiv:2103.16716 (BASE: after the middle block), arXiv:2204.08396, table 4",
    )
)
class Middle(Layout):
    """Experts in the middle, as in BASE and StableMoE; where n blocks cannot be centred, one block further up.

    BASE's implementation inserts its layer of experts between two blocks and routes the stream without a norm before
    it; here experts take the place of the block's feed-forward network, after its norm, as in every other layout.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(LayoutConfig):
        """Options of middle."""

        name: str = "middle"
        n: int = 1
        """Number of blocks with experts."""

    @staticmethod
    @override
    def plan(config: Config, num_layers: int) -> tuple[BlockPlan, ...]:
        check_count("n", config.n, num_layers)
        start = (num_layers - config.n + 1) // 2
        return place_experts(range(start, start + config.n), num_layers, Experts(shapes=config.shapes))
