"""All experts: the dense mixture of experts, in which every expert computes every token (arXiv:1312.4314).

A softmax over all experts weights their outputs. Nothing is selected.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig
from moebench.routing.values import Routing


@ROUTERS.register(
    Facts(
        family="baseline",
        equation="y = Σ_e softmax(W x)_e E_e(x)",
        paper="arXiv:1312.4314 (one layer of it)",
        use="As a reference: it shows what all experts together achieve when none is left out.",
        beware="Every expert computes every token, so only narrower experts save time. If the gate becomes certain of "
        "one expert, the others get no gradient.",
        causality=Causality(causal=True, reason="each token is weighted by its own vector", batch_dependent=False),
        balanced=True,
    )
)
class AllExperts(Router["AllExperts.Config"]):
    """Every expert computes every token, weighted by the softmax (Eigen, Ranzato and Sutskever 2013).

    The experts are trained on the error of their combined output; Jacobs et al. (1991), whose mixture this is, train
    each expert on its own error instead. In a matched arm each expert has 1/E of the width. At k=E any softmax top-k
    without renormalisation must equal this router, which makes it the differential test of the dispatch.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of all_experts: none of its own."""

        name: str = "all_experts"

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.gate = Gate(context.d_model, context.num_experts)

    @classmethod
    @override
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        return num_experts

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        logits_TE = self.gate(x_TD)
        scores_TE = logits_TE.softmax(-1)
        expert_TK = torch.arange(self.num_experts, device=x_TD.device).expand(x_TD.shape[0], -1)
        return Routing.from_top_k(
            expert_TK, scores_TE, num_experts=self.num_experts, logits_TE=logits_TE, scores_TE=scores_TE
        )
