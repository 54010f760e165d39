"""Each expert is a whole model; one router at the bottom."""

from dataclasses import dataclass

from moebench.experts.layout import LAYOUTS, BlockPlan, Experts, ExpertShape, Layout, LayoutConfig, LayoutFacts


@LAYOUTS.register(
    LayoutFacts(
        placement="one router below the first block",
        paper="arXiv:2208.03306 (branch-train-merge), arXiv:2108.05036 (DEMix)",
        experts="stacks of all blocks",
    )
)
class WholeModel(Layout):
    """The coarse end of the scale: each token lives in one expert from the first block to the last.

    It attends to the earlier tokens of its sequence that live there too, at their own positions, and to no others: what
    experts never share, they cannot mix. A token with several experts lives in each, and the sum of what they make of
    it is weighted by the router. Branch-train-merge trains each model apart on a domain of its own and mixes their
    next-token probabilities by a posterior over domains; here router and stacks are trained together, by one loss on
    the sum of what the stacks add. Attention is cheaper (shorter), so the networks are wider.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(LayoutConfig):
        """Options of whole_model."""

        name: str = "whole_model"

        def __post_init__(self) -> None:
            """Refuse a depth: a stack is as deep as the model."""
            super().__post_init__()
            self.without_depth("an expert is as deep as the model")

    @staticmethod
    def plan(config: Config, num_layers: int) -> tuple[BlockPlan, ...]:
        """Replace all blocks by one choice among stacks of them."""
        stack = ExpertShape(kind="stack", depth=num_layers)
        return (BlockPlan(stack=Experts(shapes=(stack,) * config.num_experts)),)
