"""DSelect-k: k selectors, each a smooth binary encoding of an expert's index (arXiv:2106.03760).

Each selector has log2 E smooth bits. The product of the matching bit values gives its probability for each expert,
which becomes one-hot once the bits saturate; the selectors are mixed by a softmax. Gradients are exact throughout.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import override

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.gate import TRUNCATED_STD, Gate
from moebench.routing.reduction import LossValue, reduce_record
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig, check_top_k
from moebench.routing.values import LayerRecord, Routing


@ROUTERS.register(
    Facts(
        family="adaptive computation",
        equation="r_je = Π_b S(z_jb)^bit_b(e) (1 - S(z_jb))^(1 - bit_b(e)),  z = W x,  q = Σ_j softmax(A x)_j r_j,"
        "  y = Σ_{e: q_e > 0} q_e E_e(x)",
        paper="arXiv:2106.03760, sections 3.1 and 3.2",
        use="With few experts, when the selection itself should be differentiable, as in multi-task models.",
        beware="It is dense until the bits saturate, which the cost of matched arms does not count. If E is not a "
        "power of two, part of the weight is lost.",
        causality=Causality(causal=True, reason="each token is routed by its own vector", batch_dependent=False),
        variable_k=True,
        cost="T·k·E·log E",
        own_losses=("selector_entropy", "lost_weight"),
    )
)
class DSelectK(Router["DSelectK.Config"]):
    """k selectors of log2 E smooth bits each, per token (Hazimeh et al. 2021).

    S is a cubic smooth-step: 0 below -γ/2, 1 above γ/2, with a continuous derivative. A selector whose bits are all 0
    or 1 selects one expert; before that its weight is spread over several, so routing is dense at first. The entropy
    loss drives the bits apart. If E is not a power of two, some codes belong to no expert and their weight is lost; the
    loss `lost_weight` is the paper's 1 / Σ_e r_e, minus 1. Its coefficient is 1 in the source, whatever that of the
    entropy. Both losses are means over tokens here, where the source sums over the batch.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of DSelect-k."""

        name: str = "dselect_k"
        top_k: int = 2
        """Number of selectors: experts per token once all bits are saturated."""
        gamma: float = 1.0
        """Width γ of the smooth-step."""
        losses: dict[str, float] = field(default_factory=lambda: {"selector_entropy": 1e-6, "lost_weight": 1.0})

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.top_k = config.top_k
        self.gamma = config.gamma
        self.num_bits = (context.num_experts - 1).bit_length()
        # Bits start near the middle of the step: the standard deviation of the source's U(-γ/100, γ/100).
        start_std = config.gamma / 100 / math.sqrt(3)
        scale = context.d_model * (start_std / TRUNCATED_STD) ** 2
        self.bit_gate = Gate(context.d_model, config.top_k * self.num_bits, init_scale=scale)
        self.selector_gate = Gate(context.d_model, config.top_k) if config.top_k > 1 else None

    @classmethod
    @override
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        return config.top_k

    @classmethod
    @override
    def check(cls, config: Config, num_experts: int) -> None:
        require(num_experts >= 2, "layout.num_experts", num_experts, "at least 2 for dselect_k")
        check_top_k(config.top_k, num_experts)
        require(config.gamma > 0, "router.gamma", config.gamma, "greater than 0")

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        bits_TKb = smooth_step(self.bit_gate(x_TD).view(-1, self.top_k, self.num_bits), self.gamma)
        selected_TKE = decode_selectors(bits_TKb, self.num_experts)
        weight_TE = selected_TKE.squeeze(1)
        if self.selector_gate is not None:
            share_TK = self.selector_gate(x_TD).softmax(-1)
            weight_TE = (share_TK.unsqueeze(-1) * selected_TKE).sum(1)
        entropy_TK = -(selected_TKE * selected_TKE.clamp(min=1e-20).log()).sum(-1)
        extras = {"undecided_T": entropy_TK.sum(-1), "lost_T": self._compute_lost_weight(selected_TKE).sum(-1)}
        return Routing.from_table(weight_TE, weight_TE > 0, scores_TE=weight_TE, token_extras=extras)

    def _compute_lost_weight(self, selected_TKE: Tensor) -> Tensor:
        """Return 1 / Σ_e r_e - 1 of each selector, [T, K]: 0 if every code belongs to an expert."""
        if self.num_experts == 2**self.num_bits:
            return selected_TKE[..., 0] * 0
        return (1 / selected_TKE.sum(-1).clamp(min=1e-6) - 1).clamp(min=0)

    @override
    def losses(self, record: LayerRecord) -> dict[str, LossValue]:
        extras = record.routing.token_extras
        return {
            "selector_entropy": reduce_record(record, lambda mean: mean, means=[extras["undecided_T"]]),
            "lost_weight": reduce_record(record, lambda mean: mean, means=[extras["lost_T"]]),
        }


def smooth_step(z: Tensor, gamma: float) -> Tensor:
    """Return the cubic smooth-step of width γ: exactly 0 and 1 outside it."""
    z = z.clamp(-gamma / 2, gamma / 2) / gamma
    return (-2 * z**3 + 1.5 * z + 0.5).clamp(0, 1)


def decode_selectors(bits_TKb: Tensor, num_experts: int) -> Tensor:
    """Return r_TKE: the product over bits of how much a selector's bit agrees with that of the expert's index."""
    num_bits = bits_TKb.shape[-1]
    index_E1 = torch.arange(num_experts, device=bits_TKb.device).unsqueeze(-1)
    bit_Eb = (index_E1 >> torch.arange(num_bits, device=bits_TKb.device)) & 1
    match_TKEb = torch.where(bit_Eb == 1, bits_TKb.unsqueeze(-2), 1 - bits_TKb.unsqueeze(-2))
    return match_TKEb.prod(-1)
