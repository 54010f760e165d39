"""Soft MoE: every expert processes slots, each a weighted mean of all tokens of a sequence (arXiv:2308.00951).

Logits between tokens and slots give two softmaxes: over tokens, to mix tokens into slots (dispatch), and over slots, to
mix the experts' outputs back into tokens (combine).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional
from typing_extensions import override

from moebench.errors import UsageError, require
from moebench.routing.context import RouteContext
from moebench.routing.mixing import SoftRouting
from moebench.routing.router import (
    ROUTERS,
    Causality,
    Facts,
    Form,
    Router,
    RouterBuildContext,
    RouterConfig,
    check_top_k,
)


@ROUTERS.register(
    Facts(
        family="soft",
        equation="L = s · X̂ Φ̂,  D = softmax over tokens (L),  C = softmax over slots (L),  Y = C · Experts(Dᵀ X)",
        paper="arXiv:2308.00951, eq. 1-3, normalised as in section 2.3",
        use="In vision and other encoders: nothing is selected or dropped, no loss is needed, and all experts get "
        "gradients.",
        beware="Every slot depends on the whole sequence, so it does not suit autoregressive models. Padding must be "
        "masked, and the cost grows with slots times length.",
        causality=Causality(
            causal=False,
            reason="every slot is a mean over the whole sequence",
            batch_dependent=False,
            reads_sequence=True,
        ),
        balanced=True,
        cost="T·slots",
        makes_scores=False,
    )
)
class SoftMoE(Router["SoftMoE.Config"]):
    """Tokens are mixed into slots instead of being sent to experts (Puigcerver et al. 2023).

    Balanced by construction, without a loss; nothing is dropped, so capacity and overflow do not apply. Token vectors
    and slot vectors are normalised to unit length before their product, which is multiplied by a learned scale
    (initially 1). Each sequence has its own E·p slots. The slot vectors do not depend on the length, so other lengths
    work too.
    """

    form = Form.SOFT

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of Soft MoE."""

        name: str = "soft_moe"
        average_experts: int = 1
        """Compute budget c: as many slots as top-c would assign tokens."""
        slots_per_expert: int | None = None
        """Slots p of each expert; null: sequence length · c / E, rounded, at least 1."""

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.sequence_length = context.data.sequence_length
        self.slots_per_expert = config.slots_per_expert or _solve_slots_per_expert(config.average_experts, context)
        self.slot_EPD = nn.Parameter(torch.empty(context.num_experts, self.slots_per_expert, context.d_model))
        self.scale = nn.Parameter(torch.ones(()))

    def init_weights(self, generator: Generator) -> None:
        """Initialise slot vectors of unit length on average, and the scale to 1."""
        nn.init.normal_(self.slot_EPD, std=self.slot_EPD.shape[-1] ** -0.5, generator=generator)
        nn.init.ones_(self.scale)

    @classmethod
    @override
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        return config.average_experts

    @classmethod
    @override
    def check(cls, config: Config, num_experts: int) -> None:
        check_top_k(config.average_experts, num_experts, key="average_experts")
        slots: Any = config.slots_per_expert
        require(slots is None or slots >= 1, "router.slots_per_expert", slots, "at least 1, or null")

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> SoftRouting:
        x_BLD = functional.normalize(x_TD.float().view(-1, ctx.sequence_length, x_TD.shape[-1]), dim=-1, eps=1e-6)
        slot_SD = functional.normalize(self.slot_EPD.float().flatten(0, 1), dim=-1, eps=1e-6)
        logits_BLS = self.scale * (x_BLD @ slot_SD.T)
        return SoftRouting.from_logits(logits_BLS, num_experts=self.num_experts, valid_T=ctx.valid_T)

    @override
    def rows_per_token(self, experts_per_token: int) -> float:
        if self.sequence_length is None:
            return experts_per_token
        return self.num_experts * self.slots_per_expert / self.sequence_length

    @override
    def flops_per_token(self) -> int:
        return 3 * 2 * self.slot_EPD.numel()  # logits, dispatch and combine; without the normalisations


def _solve_slots_per_expert(average_experts: int, context: RouterBuildContext) -> int:
    """Return p such that E·p slots best match the compute of c experts per token (rounded, as in V-MoE's code)."""
    if context.data.sequence_length is None:
        raise UsageError("router.slots_per_expert must be set where the task has no fixed sequence length")
    return max(1, round(context.data.sequence_length * average_experts / context.num_experts))
