"""The MoE layer: route, apply capacity, compute the experts, add the shared ones. `forward` reads top to bottom."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Generator, Tensor, nn

from moebench.experts.activation import Dropout
from moebench.experts.bank import Bank
from moebench.experts.bank_pass import BankPass
from moebench.experts.capacity import Capacity
from moebench.experts.feed_forward import FeedForward
from moebench.experts.overflow import BatchAssignments, apply_capacity
from moebench.experts.shared import SharedExperts
from moebench.ranks import Scopes, sum_together
from moebench.routing.context import RouteContext
from moebench.routing.contract import check_executed_flops, check_routing, check_statistics
from moebench.routing.gate import Gate
from moebench.routing.layer_name import LayerName
from moebench.routing.logit_router import LogitRouter
from moebench.routing.router import Router
from moebench.routing.values import AnyRouting, LayerRecord, Routing
from moebench.seeds import make_generator


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """Settings of a layer."""

    experts_per_token: int
    """The router's nominal k, which sets the capacity and the planned FLOPs."""
    capacity: Capacity = field(default_factory=Capacity)
    expert_dropout: float = 0.0
    """Dropout rate of the hidden units of experts, shared ones included, in training."""
    residual: bool = False
    """A learned gate weights the routed against the shared experts (PR-MoE) instead of adding them."""
    name: LayerName = field(default_factory=LayerName)


class MoELayer(nn.Module):
    """A bank of experts behind a router; returns its output and the record of the routing."""

    def __init__(self, router: Router, bank: Bank, options: LayerOptions, *, shared: FeedForward | None = None) -> None:
        """`shared`: a network that every token uses (see `SharedExperts`).

        Raises ValueError for a residual without a shared network.
        """
        super().__init__()
        if options.residual and shared is None:
            raise ValueError("residual=True weights the experts against a shared network, and there is none")
        self.router = router
        self.bank = bank
        self.name = options.name
        self.experts_per_token = options.experts_per_token
        self.capacity = options.capacity
        self.expert_dropout = options.expert_dropout
        self.shared = shared
        self.mix = Gate(shared.w_in_DF.shape[0], 2, bias=True) if options.residual and shared is not None else None
        self.scopes = Scopes()
        """Ranks over which tokens are counted; `parallel` sets them when the model is built."""

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> tuple[Tensor, LayerRecord]:
        """Return y_TD (without the residual stream) and the record."""
        dropout = self._dropout(ctx)
        shared = self._shared_experts(x_TD, dropout)
        while_in_flight = None if shared is None else shared.compute
        experts = BankPass(self.bank, x_TD, dropout, while_in_flight, self.experts_per_token)
        record = self.route(x_TD, replace(ctx, advance=experts.advance))
        y_TD = record.kept.compute(experts)
        return y_TD if shared is None else shared.add_to(y_TD), record

    def _dropout(self, ctx: RouteContext) -> Dropout | None:
        if not ctx.training or self.expert_dropout == 0:
            return None
        return Dropout(rate=self.expert_dropout, generator=self._row_generator(ctx))

    def _row_generator(self, ctx: RouteContext) -> Generator:
        """Return the generator of draws for each row: the rows of other processes must not draw the same."""
        if self.scopes.world.rank == 0:
            return ctx.random
        return make_generator(ctx.random.initial_seed(), "rows", self.scopes.world.rank, device=ctx.generator.device)

    def _shared_experts(self, x_TD: Tensor, dropout: Dropout | None) -> SharedExperts | None:
        if self.shared is None:
            return None
        return SharedExperts(network=self.shared, mixing_gate=self.mix, x_TD=x_TD, dropout=dropout)

    def route(self, x_TD: Tensor, ctx: RouteContext) -> LayerRecord:
        """Return the record without computing experts, for banks whose experts need more than rows."""
        with torch.autocast(x_TD.device.type, enabled=False):  # routing is fp32 in every precision
            routing = self._route_batch(x_TD.float(), ctx)
        if ctx.valid_T is not None:
            routing = routing.without_padding(ctx.valid_T)
        return LayerRecord(
            layer=self.name,
            routing=routing,
            kept=routing.with_capacity(lambda routing: self._apply_capacity(routing, ctx)),
            valid_T=ctx.valid_T,
            sequence_length=ctx.sequence_length,
            flops_E=self.bank.flops_per_row_E(),
            ranks=self.scopes.balance,
        )

    def _route_batch(self, x_TD: Tensor, ctx: RouteContext) -> AnyRouting:
        """Route the tokens; a router that needs the whole batch gets those of all processes, or their scores."""
        ranks = self.scopes.batch
        if ranks.size == 1 or not self.router.traits.needs_whole_batch:
            return check_routing(self.router, self.router(x_TD, ctx))
        lengths = ctx.span.lengths if ctx.span else ()
        if isinstance(self.router, LogitRouter) and self.router.needs_logits_only:
            logits_TE = self.router.score_tokens(x_TD, ctx)
            # Gradients stay here: no token's weights depend on the rows of others.
            gathered_TE = ranks.gather(logits_TE.detach(), lengths)
            start = ctx.span.start if ctx.span else 0
            parts = gathered_TE[:start], logits_TE, gathered_TE[start + len(logits_TE) :]
            routing = self.router.assign(torch.cat(parts), ctx.of_scored_batch(ranks))
        else:
            routing = self.router(ranks.gather(x_TD, lengths), ctx.of_whole_batch(ranks))
        batch_routing = check_routing(self.router, routing)
        assert isinstance(batch_routing, Routing)
        return batch_routing.slice_tokens(ctx.span.start if ctx.span else 0, x_TD.shape[0])

    def _apply_capacity(self, routing: Routing, ctx: RouteContext) -> Routing:
        if self.capacity.is_dropless:
            return routing  # before padding is counted, which would synchronize a GPU
        ranks = self.scopes.batch
        span = ctx.span if ctx.span and ranks.size > 1 else None
        num_tokens = span.total if span else routing.num_tokens
        slots = self.capacity.slots(
            training=ctx.training,
            num_tokens=num_tokens if ctx.valid_T is None else int(ranks.sum(ctx.valid_T.sum())),
            experts_per_token=self.experts_per_token,
            num_experts=self.bank.num_experts,
        )
        if slots is None:
            return routing
        batch = None
        if span:
            with_scores = self.capacity.overflow == "reroute"
            batch = BatchAssignments.gather(routing, span, ranks, with_scores=with_scores)
        return apply_capacity(routing, slots, self.capacity, ctx.generator, batch)

    def after_step(self, records: Sequence[LayerRecord]) -> None:
        """Let the router update its state; see `update_routers`."""
        update_routers([self], [records])

    def sum_statistics(self, records: Sequence[LayerRecord]) -> dict[str, Tensor]:
        """Return what the router's state depends on, over this process's tokens; the loads have the empty name."""
        sums = {"": torch.stack([record.routing.load_E for record in records]).sum(0)}
        for record in records:
            for name, value in check_statistics(self.router, record).items():
                sums[name] = sums[name] + value if name in sums else value
        return sums

    def flops_per_token(self, length: int = 0) -> int:
        """Return the planned forward FLOPs of one token: router, experts, shared network and mixing gate.

        `length`: tokens of a sequence, for experts that hold attention. Without padding, so capacity never costs more
        than dropless: a grouped product computes the rows that exist.
        """
        shared = 0 if self.shared is None else self.shared.flops_per_token()
        mixing = 0 if self.mix is None else 2 * self.mix.weight_ED.numel()
        return self.routed_flops_per_token(length) + shared + mixing

    def routed_flops_per_token(self, length: int = 0) -> int:
        """Return the planned forward FLOPs of router and experts for one token: an even load, nothing dropped."""
        return self.router.flops_per_token() + self.bank.flops_per_token(self.rows_per_token, length)

    def executed_flops(self, record: LayerRecord) -> Tensor:
        """Return the forward FLOPs of router and experts for the positions of a record, fp64 scalar.

        They are those of this process's tokens, whichever process computed them: the counterpart of
        `routed_flops_per_token`.
        """
        return check_executed_flops(self.router, record) + self.bank.executed_flops(record)

    @property
    def rows_per_token(self) -> float:
        """Planned rows that experts compute for one token."""
        return self.router.rows_per_token(self.experts_per_token)


@torch.no_grad()
def update_routers(layers: Sequence[MoELayer], records: Sequence[Sequence[LayerRecord]]) -> None:
    """Let routers update their state, once per optimizer step, with the records of all micro-batches of each layer.

    The counts are summed over all processes, of all layers at once, so that the state stays the same on each.
    """
    with_state = [index for index, layer in enumerate(layers) if layer.router.traits.has_state]
    statistics = [layers[index].sum_statistics(records[index]) for index in with_state]
    if not with_state:
        return
    summed = iter(sum_together([value for sums in statistics for value in sums.values()], layers[0].scopes.world))
    for index, sums in zip(with_state, statistics, strict=True):
        values = {name: next(summed) for name in sums}
        layers[index].router.after_step(values.pop(""), values)
