"""Routers whose gate is the identity, so that the inputs are the logits and routings can be computed by hand."""

from typing import Any

import torch
from torch import Tensor

from moebench.routing.context import RouteContext
from moebench.routing.router import ROUTERS, Router, RouterBuildContext
from moebench.routing.values import LayerRecord, Routing


def build_identity_router(name: str, num_experts: int, **options: Any) -> Router:
    """Build a router whose `gate` is the identity matrix."""
    router_class = ROUTERS.get(name).item
    config = router_class.Config(**options)
    router_class.check(config, num_experts)
    router: Router = router_class(config, RouterBuildContext(d_model=num_experts, num_experts=num_experts))
    with torch.no_grad():
        router.gate.weight_ED.copy_(torch.eye(num_experts))
    return router


def route_logits(router: Router, logits_TE: Tensor, *, training: bool = False, seed: int = 0, step: int = 0) -> Routing:
    """Route tokens with the given logits."""
    generator = torch.Generator().manual_seed(seed)
    ctx = RouteContext(training=training, generator=generator, sequence_length=max(len(logits_TE), 1), step=step)
    routing: Routing = router(logits_TE, ctx)
    return routing


def expert_weights(routing: Routing, token: int = 0) -> dict[int, float]:
    """Return the weight of each expert of a token."""
    routing = routing.compact()
    is_token_N = routing.token_N == token
    pairs = zip(routing.expert_N[is_token_N].tolist(), routing.weight_N[is_token_N].tolist(), strict=True)
    return dict(pairs)


def record_of(routing: Routing) -> LayerRecord:
    """Return the record of a dropless layer."""
    return LayerRecord(routing=routing, kept=routing)
