"""SparseMixer: sampling among near-best experts with a third-order gradient estimate (arXiv:2310.00811, 2409.12136).

Experts are sampled one after another from a softmax masked to those close to the best. The weight is the expert's
probability, or a third of it at random, such that the backward pass estimates the gradient of the expectation by Heun's
method.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import override

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate, uniform_to_gumbel
from moebench.routing.ranking import rank_top_k
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig, check_top_k
from moebench.routing.values import Routing

FULL_WEIGHT_PROBABILITY = 0.25
"""Probability of the full weight if the sample is not the best expert (Heun's third-order rule: 1/4 and 3/4)."""


@ROUTERS.register(
    Facts(
        family="stochastic",
        equation="p = softmax(h over {e: (max h - h_e) / max(|h_e|, max h) <= 2ε}),  i ~ p,  w = p_i · m,"
        "  m = 1 if i = argmax or with probability 1/4, else 1/3;  ∂w/∂h = p_i (1_i - p)",
        paper="arXiv:2409.12136, section 2 (SparseMixer-v2 of GRIN); v1: arXiv:2310.00811",
        use="For sampled routing whose gradient is accurate to third order, when that of top-k is too crude.",
        beware="A token of which the router is certain gives it no gradient. Sampling makes training noisier than "
        "evaluation.",
        causality=Causality(
            causal=True, reason="each token is routed by its own vector and its own draw", batch_dependent=False
        ),
        cost="T·E·k",
    )
)
class SparseMixer(Router["SparseMixer.Config"]):
    """Sample k experts one after another, without replacement (Liu et al. 2023, 2024), as in GRIN and Phi-3.5-MoE.

    If the sample is not the best expert, the forward weight is p_i or p_i/3, the two points at which Heun's rule
    evaluates; the backward pass is that of p_i. Only experts within 2ε of the best can be sampled, so the router gets
    no gradient where only one qualifies. Evaluation takes the best experts. Weights are not normalised.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of SparseMixer."""

        name: str = "sparse_mixer"
        top_k: int = 2
        """Experts per token."""
        tolerance: float = 0.01
        """Relative distance ε: experts within 2ε of the best, relative to the logits, can be sampled."""
        losses: dict[str, float] = field(default_factory=lambda: {"load_balance": 0.01})

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.gate = Gate(context.d_model, context.num_experts)
        self.top_k = config.top_k
        self.tolerance = config.tolerance

    @classmethod
    @override
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        return config.top_k

    @classmethod
    @override
    def check(cls, config: Config, num_experts: int) -> None:
        check_top_k(config.top_k, num_experts)
        require(config.tolerance >= 0, "router.tolerance", config.tolerance, "at least 0")

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        logits_TE = remaining_TE = self.gate(x_TD)
        draw_TKV = ctx.uniform(x_TD.shape[0], self.top_k, self.num_experts + 1) if ctx.training else None
        experts, weights = [], []
        for choice in range(self.top_k):
            expert_T1, weight_T1 = self._select_one(remaining_TE, None if draw_TKV is None else draw_TKV[:, choice])
            remaining_TE = remaining_TE.scatter(-1, expert_T1, -torch.inf)
            experts.append(expert_T1)
            weights.append(weight_T1)
        return Routing.from_top_k(
            torch.cat(experts, dim=-1),
            torch.cat(weights, dim=-1),
            num_experts=self.num_experts,
            logits_TE=logits_TE,
            scores_TE=logits_TE.softmax(-1),
        )

    def _select_one(self, logits_TE: Tensor, draw_TV: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return one expert for each token and its weight; V = E + 1 draws: one per expert, and one for m."""
        fixed_TE = logits_TE.detach()
        best_T1 = rank_top_k(fixed_TE, 1)
        highest_T1 = fixed_TE.gather(-1, best_T1)
        size_TE = fixed_TE.abs().maximum(highest_T1).clamp(min=1e-20)
        # Experts selected before have inf / inf = NaN, for which <= is False.
        near_TE = (highest_T1 - fixed_TE) / size_TE <= 2 * self.tolerance
        near_logits_TE = logits_TE.masked_fill(~near_TE, -torch.inf)
        p_TE = near_logits_TE.softmax(-1)
        if draw_TV is None:
            return best_T1, p_TE.gather(-1, best_T1)
        sample_T1 = rank_top_k(near_logits_TE + uniform_to_gumbel(draw_TV[:, :-1]), 1)
        p_T1 = p_TE.gather(-1, sample_T1)
        is_full_T1 = (sample_T1 == best_T1) | (draw_TV[:, -1:] < FULL_WEIGHT_PROBABILITY)
        # A third in the forward pass, the full gradient in the backward pass.
        scaled_T1 = p_T1 - (2 / 3) * p_T1.detach()
        return sample_T1, p_T1.where(is_full_T1, scaled_T1)
