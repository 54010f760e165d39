"""Oracle: the right expert of each token, read from the data."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moebench.routing.context import RouteContext
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig
from moebench.routing.values import Routing


@ROUTERS.register(
    Facts(
        family="baseline",
        equation="i = label of the token (mod E),  y = E_i(x)",
        paper="the data: arXiv:2208.02813, section 3",
        use="On made data: the ceiling that learned routers are measured against.",
        beware="It is told the answer, so its loss is no result. Needs a task that knows the labels of tokens.",
        causality=Causality(causal=True, reason="the label is known beside the token", batch_dependent=False),
        cost="T",
        learned=False,
        makes_scores=False,
        needs_labels=True,
    )
)
class Oracle(Router["Oracle.Config"]):
    """The ceiling of every learned router on made data, where it is known which tokens belong to one expert.

    What a router loses against it is the price of having to find that out. With more labels than experts several share
    one; with fewer, some experts idle.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """The oracle has no options."""

        name: str = "oracle"

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.level = context.level

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Send each token to the expert of its label."""
        assert ctx.label_T is not None
        expert_TK = self.level.expert_of(ctx.label_T, self.num_experts).unsqueeze(-1)
        weight_TK = torch.ones(expert_TK.shape, dtype=torch.float32, device=x_TD.device)
        return Routing.from_top_k(expert_TK, weight_TK, num_experts=self.num_experts)
