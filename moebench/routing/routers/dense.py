"""Dense: the plain feed-forward network that every sparse arm is measured against."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moebench.routing.context import RouteContext
from moebench.routing.router import ROUTERS, Causality, Facts, Form, Router, RouterConfig
from moebench.routing.values import Routing


@ROUTERS.register(
    Facts(
        family="baseline",
        equation="y = FFN(x),  as wide as the active experts of the other arms together",
        paper="arXiv:2209.01667, section 2",
        use="Always: the arm that every other one has to beat at equal active FLOPs.",
        beware="It has fewer parameters than the other arms. That is the point of the comparison, and has to be said.",
        causality=Causality(causal=True, reason="there is nothing to route", batch_dependent=False),
        cost="T",
        learned=False,
        makes_scores=False,
    )
)
class Dense(Router["Dense.Config"]):
    """One expert for all tokens, of the active width: the FLOP-matched dense model.

    A model built with it holds an ordinary feed-forward network in the MoE blocks, without dispatch, so that its
    throughput is that of a dense model.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """The dense baseline has no options."""

        name: str = "dense"

    form = Form.DENSE

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Send every token to expert 0 with weight 1."""
        expert_TK = torch.zeros(x_TD.shape[0], 1, dtype=torch.int64, device=x_TD.device)
        weight_TK = torch.ones_like(expert_TK, dtype=torch.float32)
        return Routing.from_top_k(expert_TK, weight_TK, num_experts=self.num_experts)
