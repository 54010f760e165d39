"""A router whose load is forced to be even: what the same layer costs when no expert waits for another."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from moebench.experts.layer import MoELayer
from moebench.routing.context import RouteContext
from moebench.routing.router import Router
from moebench.routing.values import LayerRecord, Routing


class UniformLoad(Router):
    """Asks a router, keeps its weights, and deals the experts round: token t gets t·k, t·k+1 ... modulo E."""

    def __init__(self, inner: Router) -> None:
        nn.Module.__init__(self)
        self.inner = inner
        self.config = inner.config
        self.form = inner.form
        self.num_experts = inner.num_experts

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Return the routing with other experts; a list that is no rectangle stays as it is."""
        routing: Routing = self.inner(x_TD, ctx)
        if routing.top_k is None:
            return routing
        dealt_N = torch.arange(routing.expert_N.numel(), device=routing.expert_N.device) % self.num_experts
        return replace(routing, expert_N=dealt_N)

    def losses(self, record: LayerRecord) -> dict[str, Tensor]:
        """Return the router's own losses."""
        return self.inner.losses(record)

    def objective(self, record: LayerRecord) -> Tensor | None:
        """Return the router's own objective."""
        return self.inner.objective(record)

    def statistics(self, record: LayerRecord) -> dict[str, Tensor]:
        """Return what the router's state needs."""
        return self.inner.statistics(record)

    def after_step(self, load_E: Tensor, statistics: Mapping[str, Tensor]) -> None:
        """Update the router's state."""
        self.inner.after_step(load_E, statistics)


def force_uniform_load(layers: list[MoELayer]) -> None:
    """Put the forced load before the experts of each layer."""
    for layer in layers:
        layer.router = UniformLoad(layer.router)


def can_force(records: Sequence[LayerRecord]) -> bool:
    """Whether there is a load to force: some layer, and in each k experts for every token."""
    routings = [record.routing for record in records]
    return bool(routings) and all(isinstance(routing, Routing) and routing.top_k is not None for routing in routings)
