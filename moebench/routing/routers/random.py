"""Random: k experts drawn uniformly for each token, the lower bound for every learned router (arXiv:2209.01667).

The weights are 1/k. Nothing is learned and nothing depends on the token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from moebench.routing.context import RouteContext
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig, check_top_k
from moebench.routing.values import Routing


@ROUTERS.register(
    Facts(
        family="baseline",
        equation="k experts drawn uniformly without replacement,  w = 1/k",
        paper="arXiv:2209.01667, section 4.1; control of arXiv:2202.01169",
        use="As the lower bound: it shows what additional parameters are worth when routing knows nothing about "
        "tokens.",
        beware="Loads are even on average only. In evaluation the draw depends on the batch and the position in it.",
        causality=Causality(
            causal=True, reason="the draw depends on no token", batch_dependent=True, draws_in_evaluation=True
        ),
        learned=False,
        makes_scores=False,
    )
)
class Random(Router["Random.Config"]):
    """Uniform draws, new in every training step and evaluation batch; evaluation uses a fixed seed, so it repeats.

    The difference to a learned router is the value of learned routing; the difference to the dense model is the value
    of additional parameters alone.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of random routing."""

        name: str = "random"
        top_k: int = 1
        """Experts per token."""

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.top_k = config.top_k

    @classmethod
    @override
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        return config.top_k

    @classmethod
    @override
    def check(cls, config: Config, num_experts: int) -> None:
        check_top_k(config.top_k, num_experts)

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        draw_TE = ctx.uniform(x_TD.shape[0], self.num_experts)
        expert_TK = draw_TE.topk(self.top_k, dim=-1).indices
        weight_TK = torch.full(expert_TK.shape, 1 / self.top_k, dtype=torch.float32, device=x_TD.device)
        return Routing.from_top_k(expert_TK, weight_TK, num_experts=self.num_experts)
