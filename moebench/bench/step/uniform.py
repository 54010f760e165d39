"""A router with a forced even load: the cost of the same layer without load imbalance."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from typing_extensions import override

from moebench.experts.layer import MoELayer
from moebench.routing.context import RouteContext
from moebench.routing.reduction import LossValue
from moebench.routing.router import Router
from moebench.routing.values import LayerRecord, Routing


class UniformLoad(Router):
    """Keeps the weights of a router and replaces its experts: token t gets t·k, t·k+1 ... modulo E.

    A routing with a varying number of experts per token stays as it is.
    """

    def __init__(self, inner: Router) -> None:
        nn.Module.__init__(self)
        self.inner = inner
        self.config = inner.config
        self.form = inner.form
        self.num_experts = inner.num_experts

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        routing: Routing = self.inner(x_TD, ctx)
        if routing.top_k is None:
            return routing
        even_N = torch.arange(routing.expert_N.numel(), device=routing.expert_N.device) % self.num_experts
        return replace(routing, expert_N=even_N)

    @override
    def losses(self, record: LayerRecord) -> Mapping[str, LossValue]:
        return self.inner.losses(record)

    @override
    def objective(self, record: LayerRecord) -> Tensor | None:
        return self.inner.objective(record)

    @override
    def statistics(self, record: LayerRecord) -> dict[str, Tensor]:
        return self.inner.statistics(record)

    @override
    def after_step(self, load_E: Tensor, statistics: Mapping[str, Tensor]) -> None:
        self.inner.after_step(load_E, statistics)


def force_uniform_load(layers: list[MoELayer]) -> None:
    """Wrap the router of each layer in `UniformLoad`."""
    for layer in layers:
        layer.router = UniformLoad(layer.router)


def can_force(records: Sequence[LayerRecord]) -> bool:
    """Return whether a load can be forced: there are layers, each with k experts for every token."""
    routings = [record.routing for record in records]
    return bool(routings) and all(isinstance(routing, Routing) and routing.top_k is not None for routing in routings)
