"""Autonomy of Experts: an expert's score is the norm of its own low-rank projection of the token (arXiv:2501.13074).

There is no gate. Every expert projects the token to a few dimensions, and the k experts with the longest projections
take it, weighted by a softmax over the norms.
"""

from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor, nn
from typing_extensions import override

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig, check_top_k
from moebench.routing.token_choice import TopKRule, choose_top_k
from moebench.routing.values import Routing


@ROUTERS.register(
    Facts(
        family="token choice",
        equation="a_i = |x W_i| (W_i: D x r),  p = softmax(a),  y = Σ_{i in top-k} w_i E_i(x),  w = p_i / Σ selected p",
        paper="arXiv:2501.13074",
        use="When experts should select themselves by how strongly they respond to a token.",
        beware="An expert can raise its score by scaling up its projection. The projections cost FLOPs "
        "for all experts.",
        causality=Causality(causal=True, reason="each token is routed by its own vector", batch_dependent=False),
    )
)
class AutonomyOfExperts(Router["AutonomyOfExperts.Config"]):
    """Autonomy of Experts (Lv et al. 2025): no gate; the experts with the longest projections of a token take it.

    In the paper the projection is the first factor of the expert's own first matrix, and the selected experts continue
    from it. Here the projections belong to the router and only give scores, and experts are whole networks that read x:
    a projection learns from the weights and not from the experts' output, and its cost, 2·E·D·r FLOPs per token, is
    paid on top. An expert that scales up its projection gets more tokens; only the balance loss counteracts this.
    Implemented from descriptions of the paper.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of Autonomy of Experts."""

        name: str = "autonomy_of_experts"
        top_k: int = 2
        """Experts per token."""
        rank: int = 4
        """Dimensions r of each expert's projection."""
        renormalise: bool = True
        """Divide the k weights by their sum."""
        losses: dict[str, float] = field(default_factory=lambda: {"load_balance": 0.01})

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.top_k = config.top_k
        self.renormalise = config.renormalise
        self.down_EDR = nn.Parameter(torch.empty(context.num_experts, context.d_model, config.rank))

    def init_weights(self, generator: Generator) -> None:
        """Initialise the projections with variance 1 / fan-in."""
        nn.init.normal_(self.down_EDR, std=self.down_EDR.shape[1] ** -0.5, generator=generator)

    @classmethod
    @override
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        return config.top_k

    @classmethod
    @override
    def check(cls, config: Config, num_experts: int) -> None:
        smallest = 2 if config.renormalise else 1
        check_top_k(
            config.top_k, num_experts, smallest, "at 1 a renormalised weight is always 1 and the router learns nothing"
        )
        require(config.rank >= 1, "router.rank", config.rank, "at least 1")

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        num_experts, d_model, rank = self.down_EDR.shape
        down_DX = self.down_EDR.float().transpose(0, 1).reshape(d_model, num_experts * rank)
        logits_TE = torch.linalg.vector_norm((x_TD.float() @ down_DX).view(-1, num_experts, rank), dim=-1)
        rule = TopKRule(top_k=self.top_k, weights="shares" if self.renormalise else "scores")
        expert_TK, weight_TK, scores_TE = choose_top_k(logits_TE, rule)
        return Routing.from_top_k(
            expert_TK, weight_TK, num_experts=self.num_experts, logits_TE=logits_TE, scores_TE=scores_TE
        )

    @override
    def flops_per_token(self) -> int:
        return 2 * self.down_EDR.numel()
