"""A router like Switch that sends all tokens of one layer to one expert from a step on."""

from dataclasses import dataclass

import torch

from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.router import Causality, Facts, Router, RouterBuildContext, RouterConfig
from moebench.routing.values import Routing

FACTS = Facts(
    family="token choice",
    equation="top-1, a single expert in one layer",
    paper="-",
    causality=Causality(causal=True, reason="a token's own logits", batch_dependent=False),
)


class PlantedCollapse(Router["PlantedCollapse.Config"]):
    """Tokens take turns among the experts until the collapse; with one micro-batch a step."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options."""

        name: str = "planted_collapse"
        layer: int = 5
        expert: int = 3
        first_step: int = 23
        """From 1: the first step in which the layer is collapsed."""
        last_step: int = 10**9

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.gate = Gate(context.d_model, context.num_experts)
        self.layer, self.num_steps = context.layer, 0

    def forward(self, x_TD: torch.Tensor, ctx: RouteContext) -> Routing:
        self.num_steps += ctx.training
        scores_TE = self.gate(x_TD).softmax(-1)
        expert_T = torch.arange(x_TD.shape[0], device=x_TD.device) % self.num_experts
        is_collapsed = self.config.first_step <= self.num_steps <= self.config.last_step
        if is_collapsed and self.layer == self.config.layer:
            expert_T = torch.full_like(expert_T, self.config.expert)
        expert_TK = expert_T.unsqueeze(1)
        return Routing.from_top_k(
            expert_TK,
            scores_TE.gather(1, expert_TK),
            num_experts=self.num_experts,
            logits_TE=self.gate(x_TD),
            scores_TE=scores_TE,
        )
