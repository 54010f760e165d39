"""Each expert is a whole model; one router at the bottom."""

from dataclasses import dataclass

from typing_extensions import override

from moebench.experts.layout import LAYOUTS, BlockPlan, Experts, ExpertShape, Layout, LayoutConfig, LayoutFacts


@LAYOUTS.register(
    LayoutFacts(
        placement="one router below the first block",
        paper="arXiv:2208.03306 (branch-train-merge), arXiv:2108.05036 (DEMix)",
        experts="stacks of all blocks",
    )
)
class WholeModel(Layout):
    """The coarsest experts: each token stays in one expert from the first block to the last.

    It attends only to the earlier tokens of its sequence in the same expert, at their own positions: experts share no
    states. A token with several experts is computed by each, and the router weights the sum of their outputs.
    Branch-train-merge trains each model separately on its own domain and mixes their next-token probabilities by a
    posterior over domains; here router and stacks are trained together, by one loss on the sum of what the stacks add.
    Attention spans fewer tokens and costs less, so the networks are wider.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(LayoutConfig):
        """Options of whole_model."""

        name: str = "whole_model"

        def __post_init__(self) -> None:
            super().__post_init__()
            self.require_depth_1("an expert is as deep as the model")

    @staticmethod
    @override
    def plan(config: Config, num_layers: int) -> tuple[BlockPlan, ...]:
        stack = ExpertShape(kind="stack", depth=num_layers)
        return (BlockPlan(stack=Experts(shapes=(stack,) * config.num_experts)),)
