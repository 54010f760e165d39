"""The last n blocks hold experts: the top of the model."""

from dataclasses import dataclass

from moebench.experts.layout import LAYOUTS, BlockPlan, Experts, Layout, LayoutConfig, LayoutFacts, check_count, placed


@LAYOUTS.register(LayoutFacts(placement="the last n blocks", paper="arXiv:2106.05974 (V-MoE, last-n)"))
class LastN(Layout):
    """Experts at the top, V-MoE's last-n: the deepest blocks route by what a token means."""

    @dataclass(frozen=True, kw_only=True)
    class Config(LayoutConfig):
        """Options of last_n."""

        name: str = "last_n"
        n: int = 1
        """Blocks with experts."""

    @staticmethod
    def plan(config: Config, num_layers: int) -> tuple[BlockPlan, ...]:
        """Put experts into the n blocks nearest to the head."""
        check_count("n", config.n, num_layers)
        return placed(range(num_layers - config.n, num_layers), num_layers, Experts(shapes=config.shapes))
