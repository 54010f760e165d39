"""Experts without a network beside those with one."""

from dataclasses import dataclass

from typing_extensions import override

from moebench.components import MAX_EXPERTS
from moebench.errors import require
from moebench.experts.layout import (
    LAYOUTS,
    BlockPlan,
    BlocksConfig,
    Experts,
    ExpertShape,
    Layout,
    LayoutFacts,
    place_experts,
)


@LAYOUTS.register(
    LayoutFacts(
        placement="all blocks, or those in `blocks`",
        paper="arXiv:2410.07348 (constant: eq. 5)",
        experts="num_experts networks, and zero, copy and constant experts",
    )
)
class ZeroComputation(Layout):
    """MoE++: a token that needs no network goes to an expert without one: y = 0, y = x, or y = a_1 x + a_2 v.

    Arms are matched at an even load over all experts, so the networks are wider than without these experts. The
    paper's balance loss and gates that see the last block's logits are router `moe_plus_plus`; its larger capacity for
    networks is left out.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(BlocksConfig):
        """Options of zero_computation; the numbers of experts without a network come on top of num_experts."""

        name: str = "zero_computation"
        zero: int = 1
        """Number of zero experts, with which a token skips the layer."""
        copy: int = 1
        """Number of copy experts, which return the token; the router weights it."""
        constant: int = 2
        """Number of constant experts, which return a mix of the token and a trained vector."""

        def __post_init__(self) -> None:
            super().__post_init__()
            for key in ("zero", "copy", "constant"):
                number = getattr(self, key)
                require(0 <= number <= MAX_EXPERTS, f"layout.{key}", number, f"between 0 and {MAX_EXPERTS}")

    @staticmethod
    @override
    def plan(config: Config, num_layers: int) -> tuple[BlockPlan, ...]:
        free = (
            *(ExpertShape(kind="zero"),) * config.zero,
            *(ExpertShape(kind="copy"),) * config.copy,
            *(ExpertShape(kind="constant"),) * config.constant,
        )
        return place_experts(config.block_indices(num_layers), num_layers, Experts(shapes=(*config.shapes, *free)))
