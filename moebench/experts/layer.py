"""The MoE layer: router, capacity, dispatch, experts, combine. A token's way through it is read top to bottom."""

import torch
from torch import Tensor, nn

from moebench.experts.bank import Bank
from moebench.experts.capacity import Capacity, kept_within
from moebench.experts.feed_forward import FeedForward
from moebench.routing.gate import Gate
from moebench.routing.router import Router
from moebench.routing.values import LayerRecord, RouteContext, Routing


class MoELayer(nn.Module):
    """A bank of experts behind a router; returns its output and the record of what was routed where."""

    def __init__(
        self,
        router: Router,
        bank: Bank,
        *,
        experts_per_token: int,
        capacity: Capacity,
        layer: int | str,
        shared: FeedForward | None = None,
        residual: bool = False,
    ) -> None:
        """`experts_per_token`: the router's nominal k, which sets the capacity and the FLOPs.

        `shared`: a network that every token uses too. `residual`: it and the experts are mixed by a softmax
        (PR-MoE, arXiv:2201.05596) instead of added.
        """
        super().__init__()
        self.router = router
        self.bank = bank
        self.experts_per_token = experts_per_token
        self.capacity = capacity
        self.layer = layer
        self.shared = shared
        self.mix = Gate(shared.w_in_DF.shape[0], 2) if residual and shared is not None else None

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> tuple[Tensor, LayerRecord]:
        """Return y_TD (without the residual) and the record."""
        record = self.route(x_TD, ctx)
        y_TD = self.bank.mixture(x_TD, record.kept)
        if self.shared is None:
            return y_TD, record
        if self.mix is None:
            return y_TD + self.shared(x_TD), record
        mix_T2 = self.mix(x_TD).softmax(-1).to(y_TD.dtype)
        return mix_T2[:, :1] * y_TD + mix_T2[:, 1:] * self.shared(x_TD), record

    def route(self, x_TD: Tensor, ctx: RouteContext) -> LayerRecord:
        """Return the record alone: who goes where, for a bank that needs more than rows."""
        with torch.autocast(x_TD.device.type, enabled=False):  # routing is fp32 in every precision
            routing = self.router(x_TD.float(), ctx)
        if ctx.valid_T is not None:
            routing = routing.keep(ctx.valid_T[routing.token_N])  # padding takes no slot and counts nowhere
        kept = self._within_capacity(routing, ctx)
        return LayerRecord(layer=self.layer, routing=routing, kept=kept, valid_T=ctx.valid_T)

    def _within_capacity(self, routing: Routing, ctx: RouteContext) -> Routing:
        num_tokens = routing.num_tokens if ctx.valid_T is None else int(ctx.valid_T.sum())
        slots = self.capacity.slots(
            training=ctx.training,
            num_assignments=num_tokens * self.experts_per_token,
            num_experts=self.bank.num_experts,
        )
        if slots is None:
            return routing
        return routing.keep(kept_within(routing, slots, self.capacity.drop_order, ctx.generator))

    def flops_per_token(self) -> int:
        """Forward FLOPs of one token: router, shared network, and experts at an even load; padding slots counted."""
        # A grouped product computes the rows that exist: without padding, capacity never costs more than dropless.
        flops_E = self.bank.flops_per_row_E()
        routed = self.router.flops_per_token() + self.experts_per_token * sum(flops_E) // len(flops_E)
        shared = 0 if self.shared is None else self.shared.flops_per_token()
        return routed + shared + (0 if self.mix is None else 2 * self.mix.weight_ED.numel())
