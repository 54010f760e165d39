"""Switch with a value that is not finite in one layer, at one step or in evaluation; on one rank or on all."""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from typing_extensions import override

from moebench.routing.context import RouteContext
from moebench.routing.router import ROUTERS, Causality, Facts
from moebench.routing.routers.switch import Switch
from moebench.routing.values import Routing


class InfiniteGradient(torch.autograd.Function):
    """The identity, with an infinite gradient."""

    @staticmethod
    def forward(ctx, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return gradient + torch.inf


@ROUTERS.register(
    Facts(
        family="token choice",
        equation="y = nan",
        paper="arXiv:0000.00000",
        causality=Causality(causal=True, reason="as switch", batch_dependent=False),
    )
)
class Spoiled(Switch):
    """Switch with nan weights or an infinite gradient in the calls that the options name."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Switch.Config):
        """Options."""

        name: str = "spoiled"
        step: int = 3
        """The update that is spoiled, from 0; -1: evaluations."""
        rank: int = -1
        """The rank that is spoiled; -1: all."""
        call: int = 1
        """The MoE layer that is spoiled: the number of the router, from 0, in the order in which they are built."""
        kind: str = "nan"
        """Or inf: the gradient alone."""

    num_built = 0

    def __init__(self, config, context) -> None:
        super().__init__(config, context)
        self.number = Spoiled.num_built % 2
        Spoiled.num_built += 1

    @override
    def forward(self, x_TD: torch.Tensor, ctx: RouteContext) -> Routing:
        config = self.config
        rank = dist.get_rank() if dist.is_initialized() else 0
        is_step = ctx.step == config.step if ctx.training else config.step == -1
        if self.number != config.call or not is_step or config.rank not in (-1, rank):
            return super().forward(x_TD, ctx)
        if config.kind == "inf":
            return super().forward(InfiniteGradient.apply(x_TD), ctx)
        routing = super().forward(x_TD, ctx)
        return replace(routing, weight_N=routing.weight_N * torch.nan)
