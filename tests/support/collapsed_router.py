"""A router that sends every token to the first expert."""

from dataclasses import dataclass

import torch

from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig
from moebench.routing.values import Routing


@ROUTERS.register(
    Facts(
        family="baseline",
        equation="i = 0",
        paper="-",
        causality=Causality(causal=True, reason="constant", batch_dependent=False),
    )
)
class Collapsed(Router):
    """All tokens to expert 0, with a trainable weight."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options."""

        name: str = "collapsed"

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.gate = Gate(context.d_model, context.num_experts)

    def forward(self, x_TD: torch.Tensor, ctx: RouteContext) -> Routing:
        logits_TE = self.gate(x_TD)
        scores_TE = logits_TE.softmax(-1)
        expert_TK = torch.zeros(x_TD.shape[0], 1, dtype=torch.int64, device=x_TD.device)
        return Routing.from_top_k(
            expert_TK, scores_TE[:, :1], num_experts=self.num_experts, logits_TE=logits_TE, scores_TE=scores_TE
        )
