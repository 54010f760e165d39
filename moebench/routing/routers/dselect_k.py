"""DSelect-k: k selectors that spell an expert's number in smooth bits, differentiable from dense to sparse."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.gate import CUT_STD, Gate
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig, check_top_k
from moebench.routing.values import LayerRecord, Routing


@ROUTERS.register(
    Facts(
        family="adaptive computation",
        equation="r_je = Π_b S(z_jb)^bit_b(e) (1 - S(z_jb))^(1 - bit_b(e)),  z = W x,  q = Σ_j softmax(A x)_j r_j,"
        "  y = Σ_{e: q_e > 0} q_e E_e(x)",
        paper="arXiv:2106.03760, sections 3.1 and 3.2",
        use="Few experts and a choice that can be differentiated all the way, as in multi-task models.",
        beware="Dense until the bits have settled, which the cost of matched arms does not count. Where E is not "
        "a power of two, part of the weight is lost.",
        causality=Causality(causal=True, reason="each token is routed by its own vector", batch_dependent=False),
        variable_k=True,
        cost="T·k·E·log E",
        own_losses=("selector_entropy", "lost_weight"),
    )
)
class DSelectK(Router["DSelectK.Config"]):
    """k selectors of log2 E smooth bits each, per token (Hazimeh et al. 2021).

    S is a cubic step: 0 below -γ/2, 1 above γ/2, with a continuous slope between. A selector whose bits are all 0 or
    1 names one expert; until then it spreads over several, and routing is dense at first, which the cost of a
    matched arm does not count. The entropy of the selectors pushes the bits apart. Where E is not a power of two,
    some numbers name nobody: what falls on them is lost, and the loss `lost_weight` is the paper's 1 / Σ_e r_e, less 1
    each. Its coefficient is 1 in the source, whatever that of the entropy is; both are means over tokens here, where
    the source adds up those of a batch.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of DSelect-k."""

        name: str = "dselect_k"
        top_k: int = 2
        """Selectors: experts per token when all bits have settled."""
        gamma: float = 1.0
        """Width of the smooth step (γ)."""
        losses: dict[str, float] = field(default_factory=lambda: {"selector_entropy": 1e-6, "lost_weight": 1.0})

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.top_k = config.top_k
        self.gamma = config.gamma
        self.num_bits = (context.num_experts - 1).bit_length()
        # All bits start in the middle of the step, told apart by a little noise: weights as wide as the source's, which
        # are even between -γ/100 and γ/100.
        start_std = config.gamma / 100 / math.sqrt(3)
        scale = context.d_model * (start_std / CUT_STD) ** 2
        self.bit_gate = Gate(context.d_model, config.top_k * self.num_bits, init_scale=scale)
        self.selector_gate = Gate(context.d_model, config.top_k) if config.top_k > 1 else None

    @classmethod
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        """Return k."""
        return config.top_k

    @classmethod
    def check(cls, config: Config, num_experts: int) -> None:
        """Refuse a single expert, k outside 1 ... E and a step without width."""
        require(num_experts >= 2, "layout.num_experts", num_experts, "at least 2 for dselect_k: one has no bits")
        check_top_k(config.top_k, num_experts)
        require(config.gamma > 0, "router.gamma", config.gamma, "greater than 0")

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Send each token to every expert that some selector gives any weight."""
        bits_TKb = smooth_step(self.bit_gate(x_TD).view(-1, self.top_k, self.num_bits), self.gamma)
        named_TKE = spelled(bits_TKb, self.num_experts)
        weight_TE = named_TKE.squeeze(1)
        if self.selector_gate is not None:
            share_TK = self.selector_gate(x_TD).softmax(-1)
            weight_TE = (share_TK.unsqueeze(-1) * named_TKE).sum(1)
        entropy_TK = -(named_TKE * named_TKE.clamp(min=1e-20).log()).sum(-1)
        extras = {"undecided_T": entropy_TK.sum(-1), "lost_T": self._lost(named_TKE).sum(-1)}
        return Routing.from_table(weight_TE, weight_TE > 0, scores_TE=weight_TE, token_extras=extras)

    def _lost(self, named_TKE: Tensor) -> Tensor:
        """Return 1 / Σ_e r_e - 1 of each selector, [T, K]: 0 where every number names an expert."""
        if self.num_experts == 2**self.num_bits:
            return named_TKE[..., 0] * 0
        return (1 / named_TKE.sum(-1).clamp(min=1e-6) - 1).clamp(min=0)

    def losses(self, record: LayerRecord) -> dict[str, Tensor]:
        """Return the means over tokens of the selectors' entropies and of what they lose on numbers of nobody."""
        extras = record.routing.token_extras
        return {"selector_entropy": record.mean(extras["undecided_T"]), "lost_weight": record.mean(extras["lost_T"])}


def smooth_step(z: Tensor, gamma: float) -> Tensor:
    """Return the cubic step of width γ: exactly 0 and 1 outside it."""
    z = z.clamp(-gamma / 2, gamma / 2) / gamma
    return (-2 * z**3 + 1.5 * z + 0.5).clamp(0, 1)


def spelled(bits_TKb: Tensor, num_experts: int) -> Tensor:
    """Return r_TKE: the product over bits of how much a selector's bit agrees with that of the expert's number."""
    num_bits = bits_TKb.shape[-1]
    number_E1 = torch.arange(num_experts, device=bits_TKb.device).unsqueeze(-1)
    bit_Eb = (number_E1 >> torch.arange(num_bits, device=bits_TKb.device)) & 1
    agree_TKEb = torch.where(bit_Eb == 1, bits_TKb.unsqueeze(-2), 1 - bits_TKb.unsqueeze(-2))
    return agree_TKEb.prod(-1)
