"""Routers whose gate is the identity: what goes in are the logits, so that routings can be worked by hand."""

from typing import Any

import torch
from torch import Tensor

from moebench.routing.context import RouteContext
from moebench.routing.router import ROUTERS, Router, RouterBuildContext
from moebench.routing.values import LayerRecord, Routing


def build_identity_router(name: str, num_experts: int, **options: Any) -> Router:
    """Build a router whose `gate` hands its input on as logits."""
    router_class = ROUTERS.get(name).item
    config = router_class.Config(**options)
    router_class.check(config, num_experts)
    router: Router = router_class(config, RouterBuildContext(d_model=num_experts, num_experts=num_experts))
    with torch.no_grad():
        router.gate.weight_ED.copy_(torch.eye(num_experts))
    return router


def routed(router: Router, logits_TE: Tensor, *, training: bool = False, seed: int = 0, step: int = 0) -> Routing:
    """Route tokens with these logits."""
    generator = torch.Generator().manual_seed(seed)
    ctx = RouteContext(training=training, generator=generator, sequence_length=max(len(logits_TE), 1), step=step)
    routing: Routing = router(logits_TE, ctx)
    return routing


def chosen(routing: Routing, token: int = 0) -> dict[int, float]:
    """Return the experts of a token and their weights, without those that do not count."""
    routing = routing.compact()
    own = routing.token_N == token
    pairs = zip(routing.expert_N[own].tolist(), routing.weight_N[own].tolist(), strict=True)
    return dict(pairs)


def record_of(routing: Routing) -> LayerRecord:
    """Return the record of a dropless layer."""
    return LayerRecord(routing=routing, kept=routing)
