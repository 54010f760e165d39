"""SparseMixer: experts are drawn among the near-best, and the gradient of the draw is estimated to third order."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate, gumbel
from moebench.routing.ranking import rank_top_k
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig, check_top_k
from moebench.routing.values import Routing

KEPT_WHOLE = 0.25
"""Probability of the full weight where a draw missed the best expert (Heun's third-order rule: 1/4 and 3/4)."""


@ROUTERS.register(
    Facts(
        family="stochastic",
        equation="p = softmax(h over {e: (max h - h_e) / max(|h_e|, max h) <= 2ε}),  i ~ p,  w = p_i · m,"
        "  m = 1 if i = argmax or with probability 1/4, else 1/3;  ∂w/∂h = p_i (1_i - p)",
        paper="arXiv:2409.12136, section 2 (SparseMixer-v2 of GRIN); v1: arXiv:2310.00811",
        use="Sampled routing with a gradient that is right to third order, where top-k's gradient seems too crude.",
        beware="A router that is sure of a token gets no gradient from it. Sampling makes training noisier than "
        "evaluation.",
        causality=Causality(
            causal=True, reason="each token is routed by its own vector and its own draw", batch_dependent=False
        ),
        cost="T·E·k",
    )
)
class SparseMixer(Router["SparseMixer.Config"]):
    """Draws k experts one after the other, each from those left (Liu et al. 2023, 2024), as in GRIN and Phi-3.5-MoE.

    The forward weight of a draw that missed the best expert is p_i or p_i/3, at the two places where Heun's rule
    evaluates; the backward pass is that of p_i. Only experts within 2ε of the best can be drawn, so a router that is
    sure of a token gets no gradient from it. In evaluation the best are taken. Weights are not normalised.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of SparseMixer."""

        name: str = "sparse_mixer"
        top_k: int = 2
        """Experts per token."""
        tolerance: float = 0.01
        """How far below the best an expert may be and still be drawn, relative to the logits (ε)."""
        losses: dict[str, float] = field(default_factory=lambda: {"load_balance": 0.01})

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.gate = Gate(context.d_model, context.num_experts)
        self.top_k = config.top_k
        self.tolerance = config.tolerance

    @classmethod
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        """Return k."""
        return config.top_k

    @classmethod
    def check(cls, config: Config, num_experts: int) -> None:
        """Refuse k outside 1 ... E and a tolerance below 0."""
        check_top_k(config.top_k, num_experts)
        require(config.tolerance >= 0, "router.tolerance", config.tolerance, "at least 0")

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Choose k experts for each token, each among those that are left."""
        logits_TE = left_TE = self.gate(x_TD)
        draw_TKV = ctx.uniform(x_TD.shape[0], self.top_k, self.num_experts + 1) if ctx.training else None
        experts, weights = [], []
        for choice in range(self.top_k):
            expert_T1, weight_T1 = self._choose(left_TE, None if draw_TKV is None else draw_TKV[:, choice])
            left_TE = left_TE.scatter(-1, expert_T1, -torch.inf)
            experts.append(expert_T1)
            weights.append(weight_T1)
        return Routing.from_top_k(
            torch.cat(experts, dim=-1),
            torch.cat(weights, dim=-1),
            num_experts=self.num_experts,
            logits_TE=logits_TE,
            scores_TE=logits_TE.softmax(-1),
        )

    def _choose(self, logits_TE: Tensor, draw_TV: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return one expert for each token and its weight; the draws are one for each expert and one for m."""
        fixed_TE = logits_TE.detach()
        best_T1 = rank_top_k(fixed_TE, 1)
        highest_T1 = fixed_TE.gather(-1, best_T1)
        size_TE = fixed_TE.abs().maximum(highest_T1).clamp(min=1e-20)
        # Asked the other way about: what was chosen before has inf / inf here, and stays out.
        near_TE = (highest_T1 - fixed_TE) / size_TE <= 2 * self.tolerance
        near_logits_TE = logits_TE.masked_fill(~near_TE, -torch.inf)
        p_TE = near_logits_TE.softmax(-1)
        if draw_TV is None:
            return best_T1, p_TE.gather(-1, best_T1)
        drawn_T1 = rank_top_k(near_logits_TE + gumbel(draw_TV[:, :-1]), 1)
        p_T1 = p_TE.gather(-1, drawn_T1)
        whole_T1 = (drawn_T1 == best_T1) | (draw_TV[:, -1:] < KEPT_WHOLE)
        third_T1 = p_T1 - (2 / 3) * p_T1.detach()  # a third forward, the whole gradient backward
        return drawn_T1, p_T1.where(whole_T1, third_T1)
