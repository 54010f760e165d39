"""Autonomy of experts: an expert's score is the length of what it makes of the token itself."""

from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor, nn

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.ranking import rank_top_k
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig, check_top_k
from moebench.routing.values import Routing


@ROUTERS.register(
    Facts(
        family="token choice",
        equation="a_i = |x W_i| (W_i: D x r),  p = softmax(a),  y = Σ_{i in top-k} w_i E_i(x),  w = p_i / Σ chosen p",
        paper="arXiv:2501.13074",
        use="Experts that choose themselves by how strongly they respond.",
        beware="An expert can raise its score by growing its projection. The projections cost FLOPs for all experts.",
        causality=Causality(causal=True, reason="each token is routed by its own vector", batch_dependent=False),
    )
)
class AutonomyOfExperts(Router["AutonomyOfExperts.Config"]):
    """Autonomy of experts (Lv et al. 2025): no gate; experts whose narrow projection of the token is longest take it.

    In the paper the projection is the first factor of the expert's own first matrix, and the chosen experts go on from
    it. Here projections belong to the router and give scores alone, and experts are whole networks that read x: so a
    projection learns from the choice and not from the experts' output, and its cost, 2·E·D·r FLOPs for each token, is
    paid on top. An expert that makes its projection longer gets more tokens: only the balance loss speaks against it.
    Read from descriptions of the paper.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of autonomy of experts."""

        name: str = "autonomy_of_experts"
        top_k: int = 2
        """Experts per token."""
        rank: int = 4
        """Numbers r of each expert's projection."""
        renormalise: bool = True
        """Divide the weights by their sum."""
        losses: dict[str, float] = field(default_factory=lambda: {"load_balance": 0.01})

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.top_k = config.top_k
        self.renormalise = config.renormalise
        self.down_EDR = nn.Parameter(torch.empty(context.num_experts, context.d_model, config.rank))

    def init_weights(self, generator: Generator) -> None:
        """Draw projections with variance 1 / fan-in."""
        nn.init.normal_(self.down_EDR, std=self.down_EDR.shape[1] ** -0.5, generator=generator)

    @classmethod
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        """Return k."""
        return config.top_k

    @classmethod
    def check(cls, config: Config, num_experts: int) -> None:
        """Refuse k outside 1 ... E, and a renormalised k of 1."""
        smallest = 2 if config.renormalise else 1
        check_top_k(config.top_k, num_experts, smallest, "renormalised at 1 the weight is always 1, nothing is learned")
        require(config.rank >= 1, "router.rank", config.rank, "at least 1")

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Send each token to the experts whose projections of it are longest."""
        num_experts, d_model, rank = self.down_EDR.shape
        down_DX = self.down_EDR.float().transpose(0, 1).reshape(d_model, num_experts * rank)
        logits_TE = torch.linalg.vector_norm((x_TD.float() @ down_DX).view(-1, num_experts, rank), dim=-1)
        scores_TE = logits_TE.softmax(-1)
        expert_TK = rank_top_k(logits_TE, self.top_k)
        weight_TK = scores_TE.gather(-1, expert_TK)
        if self.renormalise:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True).clamp(min=1e-20)
        return Routing.from_top_k(
            expert_TK, weight_TK, num_experts=self.num_experts, logits_TE=logits_TE, scores_TE=scores_TE
        )

    def flops_per_token(self) -> int:
        """Return 2·E·D·r: every expert projects every token."""
        return 2 * self.down_EDR.numel()
