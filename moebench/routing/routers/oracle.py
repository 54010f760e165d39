"""Oracle: the expert of each token by its label, which synthetic data provides."""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from moebench.routing.context import RouteContext
from moebench.routing.features.feature import Feature
from moebench.routing.features.token_labels import TokenLabels
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig
from moebench.routing.values import Routing


@ROUTERS.register(
    Facts(
        family="baseline",
        equation="i = label of the token (mod E),  y = E_i(x)",
        paper="the data: arXiv:2208.02813, section 3",
        use="On synthetic data, as the upper bound for learned routers.",
        beware="It reads the label that learned routers have to infer, so its loss is not a result. It needs a task "
        "with token labels.",
        causality=Causality(causal=True, reason="the label is part of the data", batch_dependent=False),
        cost="T",
        learned=False,
        makes_scores=False,
    )
)
class Oracle(Router["Oracle.Config"]):
    """Upper bound for learned routers on synthetic data, where it is known which tokens belong to one expert.

    The difference of a learned router from it is the cost of learning the labels. With more labels than experts,
    several labels share an expert; with fewer, some experts are idle.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """The oracle has no options."""

        name: str = "oracle"

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.level = context.level

    @classmethod
    @override
    def required_features(cls, config: Config) -> tuple[Feature, ...]:
        return (TokenLabels(),)

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        expert_TK = self.level.select_expert(ctx.features[TokenLabels], self.num_experts).unsqueeze(-1)
        weight_TK = torch.ones(expert_TK.shape, dtype=torch.float32, device=x_TD.device)
        return Routing.from_top_k(expert_TK, weight_TK, num_experts=self.num_experts)
