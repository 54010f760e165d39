"""Small routers that learn from rewards, with contexts and records for them."""

from typing import Any

import torch
from support.cases import randomise_parameters
from torch import Tensor

from moebench.routing.context import DataSummary, RouteContext
from moebench.routing.router import ROUTERS, RouterBuildContext
from moebench.routing.values import LayerRecord, Routing

WIDTH = 3


def build_router(name: str, num_experts: int, *, num_domains: int = 2, **options: Any) -> Any:
    """Build a router over vectors of 3 elements."""
    router_class = ROUTERS.get(name).item
    context = RouterBuildContext(d_model=WIDTH, num_experts=num_experts, data=DataSummary(num_domains=num_domains))
    return randomise_parameters(router_class(router_class.Config(**options), context))


def make_context(num_tokens: int, *, training: bool = True, seed: int = 0, **values: Any) -> RouteContext:
    generator = torch.Generator().manual_seed(seed)
    return RouteContext(training=training, generator=generator, sequence_length=max(num_tokens, 1), **values)


def record_of(routing: Routing, token_loss_T: Tensor, valid_T: Tensor | None = None) -> LayerRecord:
    return LayerRecord(routing=routing, kept=routing, valid_T=valid_T, token_loss_T=token_loss_T)
