"""The first n blocks hold experts: the bottom of the model."""

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


@LAYOUTS.register(LayoutFacts(placement="the first n blocks", paper="arXiv:2204.08396, table 4 (bottom)"))
class FirstN(Layout):
    """Experts at the bottom, where vectors are close to the embeddings: StableMoE found this placement the worst."""

    @dataclass(frozen=True, kw_only=True)
    class Config(LayoutConfig):
        """Options of first_n."""

        name: str = "first_n"
        n: int = 1
        """Number of blocks with experts."""

    @staticmethod
    @override
    def plan(config: Config, num_layers: int) -> tuple[BlockPlan, ...]:
        check_count("n", config.n, num_layers)
        return place_experts(range(config.n), num_layers, Experts(shapes=config.shapes))
