"""A router of your own, compared with top_k: python examples/own_router.py [RESULTS]"""

import sys
from dataclasses import dataclass, field

from torch import Tensor

import moebench
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.ranking import rank_top_k
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig
from moebench.routing.values import Routing

FACTS = Facts(
    family="token choice",
    equation="s = sigmoid(W x),  i = argmax_e s_e,  y = s_i · E_i(x)",
    paper="arXiv:2310.10837",
    causality=Causality(causal=True, reason="each token is routed by its own vector", batch_dependent=False),
)


class SigmoidRouter(Router):
    """Top-1 by a sigmoid: experts do not compete for the weight."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options."""

        name: str = "sigmoid_router"
        losses: dict[str, float] = field(default_factory=lambda: {"load_balance": 0.01})

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.gate = Gate(context.d_model, context.num_experts)

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Send each token to the expert with the highest score."""
        logits_TE = self.gate(x_TD)
        scores_TE = logits_TE.sigmoid()
        expert_TK = rank_top_k(logits_TE, 1)
        weight_TK = scores_TE.gather(-1, expert_TK)
        return Routing.from_top_k(
            expert_TK, weight_TK, num_experts=self.num_experts, logits_TE=logits_TE, scores_TE=scores_TE
        )


def main(results: str = "results", *overrides: str) -> None:
    """Train the arms that are missing and print the comparison."""
    experiment = moebench.load_experiment(
        "quickstart",
        ["grid.router=[dense,top_k,sigmoid_router]", "train.steps=200", *overrides],
        plugins=[__file__],
    )
    moebench.run(experiment, results, tracker="none")
    print(moebench.to_text(moebench.compare(experiment, results)))


if __name__ == "__main__":
    main(*sys.argv[1:])
else:  # loaded as a plugin, here and in every worker process
    ROUTERS.register(FACTS)(SigmoidRouter)
