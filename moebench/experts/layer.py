"""The MoE layer: router, capacity, dispatch, experts, combine. A token's way through it is read top to bottom."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Generator, Tensor, nn

from moebench.experts.bank import Bank
from moebench.experts.bank_pass import BankPass
from moebench.experts.capacity import Capacity
from moebench.experts.chain import Chain
from moebench.experts.dropout import Dropout
from moebench.experts.feed_forward import FeedForward
from moebench.experts.overflow import Batch, passed_on, within_capacity
from moebench.experts.soft import soft_mixture
from moebench.ranks import Scopes
from moebench.routing.context import RouteContext
from moebench.routing.contract import check_routing
from moebench.routing.gate import Gate
from moebench.routing.mixing import MergeRouting, SoftRouting
from moebench.routing.router import Router
from moebench.routing.values import AnyRouting, ChainRouting, LayerRecord, Routing
from moebench.seeds import make_generator


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
        expert_dropout: float = 0.0,
    ) -> None:
        """`experts_per_token`: the router's nominal k, which sets the capacity and the FLOPs.

        `shared`: a network that every token uses (DeepSeekMoE's shared experts, arXiv:2401.06066, section 3.2, are
        one network of their summed width), added to what the bank gives. `residual`: instead of adding, weigh the
        two by c = softmax(x W_c + b) (PR-MoE, arXiv:2201.05596, section 4.1; the learned c and its bias are those of
        its implementation, DeepSpeed). `expert_dropout`: rate for the hidden activations of experts, shared ones
        included, in training. Raises ValueError for a residual without a shared network.
        """
        super().__init__()
        if residual and shared is None:
            raise ValueError("residual=True weighs the experts against a shared network, and there is none")
        self.router = router
        self.bank = bank
        self.experts_per_token = experts_per_token
        self.capacity = capacity
        self.layer = layer
        self.shared = shared
        self.mix = Gate(shared.w_in_DF.shape[0], 2, bias=True) if residual and shared is not None else None
        self.expert_dropout = expert_dropout
        self.scopes = Scopes()
        """Whose tokens count beside those of this process; `parallel` sets it when the model is built."""

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> tuple[Tensor, LayerRecord]:
        """Return y_TD (without the residual stream) and the record."""
        dropout = None
        if ctx.training and self.expert_dropout > 0:
            dropout = Dropout(rate=self.expert_dropout, generator=self._own_generator(ctx))
        # In a chain the experts compute while the router is asked: it decides by what they made of a token.
        chain = Chain(self.bank, x_TD, dropout) if self.router.form.is_chain else None
        record = self.route(x_TD, ctx if chain is None else replace(ctx, advance=chain.advance))
        routing, kept = record.routing, record.kept
        shared: list[Tensor] = []

        def compute_shared() -> None:  # when there is time: while rows are on their way to other processes
            if self.shared is not None:
                shared.append(self.shared(x_TD, dropout))

        if chain is not None:
            assert isinstance(kept, ChainRouting)
            y_TD = chain.output(kept)
            compute_shared()
        elif isinstance(kept, SoftRouting):
            y_TD = soft_mixture(self.bank, x_TD, kept, dropout, compute_shared)
        elif isinstance(kept, MergeRouting):
            y_TD = merged_mixture(self.bank, x_TD, kept, dropout, compute_shared)
        else:
            y_TD = self.bank.mixture(x_TD, kept, dropout, compute_shared)
            if self.capacity.overflow == "pass" and isinstance(routing, Routing) and kept is not routing:
                y_TD = y_TD + passed_on(routing, kept, x_TD)
        return self._with_shared(y_TD, x_TD, *shared), record

    def _own_generator(self, ctx: RouteContext) -> Generator:
        """Return a generator for what is drawn per row: the rows of other processes must not draw the same."""
        if self.scopes.world.rank == 0:
            return ctx.generator
        return make_generator(ctx.generator.initial_seed(), "rows", self.scopes.world.rank, device=ctx.generator.device)

    def route(self, x_TD: Tensor, ctx: RouteContext) -> LayerRecord:
        """Return the record alone: who goes where, for banks whose experts need more than rows."""
        with torch.autocast(x_TD.device.type, enabled=False):  # routing is fp32 in every precision
            routing = self._routed(x_TD.float(), ctx)
        kept = routing
        if isinstance(routing, Routing):
            if ctx.valid_T is not None:
                routing = routing.keep(ctx.valid_T[routing.token_N])  # padding takes no slot and counts nowhere
            kept = routing if isinstance(routing, ChainRouting) else self._within_capacity(routing, ctx)
        return LayerRecord(
            layer=self.layer,
            routing=routing,
            kept=kept,
            valid_T=ctx.valid_T,
            sequence_length=ctx.sequence_length,
            flops_E=self.bank.flops_per_row_E(),
            ranks=self.scopes.balance,
        )

    def _routed(self, x_TD: Tensor, ctx: RouteContext) -> AnyRouting:
        ranks = self.scopes.batch
        if ranks.size == 1 or not self.router.traits.needs_whole_batch:
            return check_routing(self.router, self.router(x_TD, ctx))
        whole = check_routing(self.router, self.router(ranks.gather(x_TD), ctx.of_whole_batch(ranks)))
        start = ctx.span.start if ctx.span else 0
        assert isinstance(whole, Routing)
        return whole.slice_tokens(start, x_TD.shape[0])

    def _within_capacity(self, routing: Routing, ctx: RouteContext) -> Routing:
        if self.capacity.is_dropless:
            return routing  # before padding is counted, for which a GPU would be waited for
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
        batch = Batch.of(routing, span, ranks) if span else None
        return within_capacity(routing, slots, self.capacity, ctx.generator, batch)

    def _with_shared(self, y_TD: Tensor, x_TD: Tensor, shared_TD: Tensor | None = None) -> Tensor:
        if shared_TD is None:
            return y_TD
        if self.mix is None:
            return y_TD + shared_TD
        with torch.autocast(x_TD.device.type, enabled=False):
            share_T2: Tensor = self.mix(x_TD.float()).softmax(-1)
        return share_T2[:, :1].to(y_TD.dtype) * y_TD + share_T2[:, 1:].to(shared_TD.dtype) * shared_TD

    @torch.no_grad()
    def after_step(self, records: Sequence[LayerRecord]) -> None:
        """Let the router update its state: once per optimizer step, with a record for each of its micro-batches.

        The counts are those of all processes, so that the state stays the same on each.
        """
        if not self.router.traits.has_state:
            return
        load_E = torch.stack([record.routing.load_E for record in records]).sum(0)
        sums: dict[str, Tensor] = {}
        for record in records:
            for name, value in self.router.statistics(record).items():
                sums[name] = sums[name] + value if name in sums else value
        total = self.scopes.world.sum
        self.router.after_step(total(load_E), {name: total(value) for name, value in sums.items()})

    def flops_per_token(self, length: int = 0) -> int:
        """Forward FLOPs of one token as planned: the router, its experts, the shared network and its weighing.

        `length`: tokens of a sequence, for experts that hold attention. Without padding, so capacity never costs more
        than dropless: a grouped product computes the rows that exist.
        """
        shared = 0 if self.shared is None else self.shared.flops_per_token()
        weighing = 0 if self.mix is None else 2 * self.mix.weight_ED.numel()
        return self.routed_flops_per_token(length) + shared + weighing

    def routed_flops_per_token(self, length: int = 0) -> int:
        """Forward FLOPs of the router and the experts of one token, as planned: an even load, nothing dropped."""
        return self.router.flops_per_token() + self.bank.flops_per_token(self.rows_per_token, length)

    def executed_flops(self, record: LayerRecord) -> Tensor:
        """Return the forward FLOPs of router and experts that a record's positions cost, fp64 scalar.

        Of this process's tokens, whichever process computed them. The counterpart of `routed_flops_per_token`.
        """
        return self.router.executed_flops(record) + self.bank.executed_flops(record)

    @property
    def rows_per_token(self) -> float:
        """Rows that experts compute for one token, as planned."""
        return self.router.rows_per_token(self.experts_per_token)
