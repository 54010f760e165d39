"""The middle blocks hold experts."""

from dataclasses import dataclass

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
    """Experts half-way up, as in BASE and StableMoE; where n does not centre, one block further up.

    BASE's implementation inserts its layer of experts between two blocks and routes the stream without a norm before
    it; here experts take the place of the block's feed-forward network, behind its norm, as in every other layout.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(LayoutConfig):
        """Options of middle."""

        name: str = "middle"
        n: int = 1
        """Blocks with experts."""

    @staticmethod
    def plan(config: Config, num_layers: int) -> tuple[BlockPlan, ...]:
        """Put experts into n blocks around the middle."""
        check_count("n", config.n, num_layers)
        start = (num_layers - config.n + 1) // 2
        return place_experts(range(start, start + config.n), num_layers, Experts(shapes=config.shapes))
