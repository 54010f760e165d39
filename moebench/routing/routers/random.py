"""Random: the floor under every learned router."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moebench.routing.context import RouteContext
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig, check_top_k
from moebench.routing.values import Routing


@ROUTERS.register(
    Facts(
        family="baseline",
        equation="k experts drawn uniformly without replacement,  w = 1/k",
        paper="arXiv:2209.01667, section 4.1; control of arXiv:2202.01169",
        use="The floor: what parameters alone are worth when nothing is known about tokens.",
        beware="Loads are even on average only. In evaluation the draw belongs to the batch and the place in it.",
        causality=Causality(
            causal=True, reason="the draw does not look at any token", batch_dependent=True, draws_in_evaluation=True
        ),
        learned=False,
        makes_scores=False,
    )
)
class Random(Router["Random.Config"]):
    """Uniform draws, new in every step and in every batch of an evaluation, there from a fixed seed: results repeat.

    What it loses against a learned router is what learning to route is worth; what it gains over the dense
    model is what mere parameters are worth.
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
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        """Return k."""
        return config.top_k

    @classmethod
    def check(cls, config: Config, num_experts: int) -> None:
        """Refuse k outside 1 ... E."""
        check_top_k(config.top_k, num_experts)

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Draw k different experts for each token."""
        draw_TE = ctx.uniform(x_TD.shape[0], self.num_experts)
        expert_TK = draw_TE.topk(self.top_k, dim=-1).indices
        weight_TK = torch.full(expert_TK.shape, 1 / self.top_k, dtype=torch.float32, device=x_TD.device)
        return Routing.from_top_k(expert_TK, weight_TK, num_experts=self.num_experts)
