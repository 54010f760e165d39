"""Dense: the plain feed-forward network that every sparse arm is compared with (arXiv:2209.01667).

All tokens go to one expert with weight 1, which is as wide as the active experts of the other arms together.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from moebench.routing.context import RouteContext
from moebench.routing.router import ROUTERS, Causality, Facts, Form, Router, RouterConfig
from moebench.routing.values import Routing


@ROUTERS.register(
    Facts(
        family="baseline",
        equation="y = FFN(x),  as wide as the active experts of the other arms together",
        paper="arXiv:2209.01667, section 2",
        use="Always: it is the arm that every other arm must beat at equal active FLOPs.",
        beware="It has fewer parameters than the other arms, which is the point of the comparison and must be stated.",
        causality=Causality(causal=True, reason="there is nothing to route", batch_dependent=False),
        cost="T",
        learned=False,
        makes_scores=False,
    )
)
class Dense(Router["Dense.Config"]):
    """One expert of the active width for all tokens: the FLOP-matched dense model.

    A model with this router holds ordinary feed-forward networks in its MoE blocks, without dispatch, so that its
    throughput is that of a dense model.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of dense: none."""

        name: str = "dense"

    form = Form.DENSE

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        expert_TK = torch.zeros(x_TD.shape[0], 1, dtype=torch.int64, device=x_TD.device)
        weight_TK = torch.ones_like(expert_TK, dtype=torch.float32)
        return Routing.from_top_k(expert_TK, weight_TK, num_experts=self.num_experts)
