"""A bank: E experts that compute what a routing says. The kinds of banks differ in what an expert is."""

from collections.abc import Callable
from functools import partial
from typing import ClassVar, Protocol

import torch
from torch import Generator, Tensor, nn
from torch.distributed.tensor import DTensor

from moebench.experts.dispatch import DispatchPlan, combine, dispatch
from moebench.experts.dropout import Dropout
from moebench.experts.grouped import as_autocast
from moebench.routing.values import LayerRecord, Routing

Compute = Callable[[Tensor, Tensor], Tensor]
"""(x_RI, load_E) -> y_RO: experts on rows that are sorted by expert."""


class Exchange(Protocol):
    """The way of rows to experts on other processes and back; `parallel` brings it."""

    def __call__(
        self, compute: Compute, x_RI: Tensor, load_E: Tensor, while_in_flight: Callable[[], None] | None = None
    ) -> Tensor:
        """Return y_RO for rows sorted by expert: each computed by `compute` where its expert lives.

        `while_in_flight` is called once while the rows are on their way.
        """

    def count_sent_rows(self, rows_E: Tensor) -> int:
        """Return how many rows leave this process, of `rows_E` for each expert."""

    def count_local_rows(self, rows_E: Tensor) -> int:
        """Return how many rows are for the experts of this process, of `rows_E` for each expert."""


class Bank(nn.Module):
    """E experts x_D -> y_D behind one way of computing a routing: dispatch, the experts on sorted rows, combine.

    A kind of expert defines `rows`, `expert`, `init_weights` and `flops_per_row_E`; one that can do better than row
    by row overrides `mixture`. Where the experts are spread over processes, `rows` computes those that are here.
    """

    num_experts: int
    """Of all processes together."""
    reads_loads: ClassVar[bool] = False
    """Python must know each expert's number of rows: a GPU is waited for, and no row is left to nobody."""
    stays: ClassVar[bool] = False
    """Every process has all the experts, even where others are spread: computing is cheaper than sending."""
    exchange: Exchange | None = None
    """Brings rows to their experts where these are spread over processes; None: all are here."""

    def forward(
        self,
        x_RD: Tensor,
        load_E: Tensor,
        dropout: Dropout | None = None,
        while_in_flight: Callable[[], None] | None = None,
    ) -> Tensor:
        """Return y_RD for rows sorted by expert, wherever their experts are; `while_in_flight`: see `Exchange`."""
        return self.through(partial(self.rows, dropout=dropout), x_RD, load_E, while_in_flight)

    def through(
        self, compute: Compute, x_RI: Tensor, load_E: Tensor, while_in_flight: Callable[[], None] | None = None
    ) -> Tensor:
        """Return what `compute` makes of the rows where their experts are."""
        if self.exchange is not None:
            (x_RI,) = as_autocast(x_RI)  # it is multiplied in that precision anyway: half the bytes on the way
            return self.exchange(compute, x_RI, load_E, while_in_flight)
        y_RO = compute(x_RI, load_E)
        if while_in_flight is not None:
            while_in_flight()
        return y_RO

    def init_weights(self, generator: Generator) -> None:
        """Draw the weights of all experts."""
        raise NotImplementedError

    def rows(self, x_RD: Tensor, load_E: Tensor, dropout: Dropout | None = None) -> Tensor:
        """Return y_RD: the first load_E[0] rows through expert 0, the next through expert 1, and so on.

        `dropout` is for hidden activations inside the experts.
        """
        raise NotImplementedError

    def elements_per_row(self) -> int:
        """Numbers that a row for another process carries, there and back; banks that stay carry none."""
        return 0

    def elements_sent(self, rows_E: Tensor) -> int:
        """Return how many numbers a forward pass sends to other processes, of `rows_E` for each expert."""
        return 0 if self.exchange is None else self.exchange.count_sent_rows(rows_E) * self.elements_per_row()

    def count_computed_rows(self, own_E: Tensor, shared_E: Tensor) -> int:
        """Return how many rows this process computes: of its own tokens' rows, or of all that share the experts."""
        return int(own_E.sum()) if self.exchange is None else self.exchange.count_local_rows(shared_E)

    def expert(self, x_RD: Tensor, index: int) -> Tensor:
        """Return what one expert computes: the slow, obvious form that the oracle of the tests uses."""
        raise NotImplementedError

    def merged(self, x_GSD: Tensor, weight_GE: Tensor, dropout: Dropout | None = None) -> Tensor:
        """Return y_GSD: the rows of each segment through one network with the parameters Σ_e w_ge θ_e.

        Only experts of one shape have such a sum; where a plan has others, a router that merges is refused.
        """
        raise NotImplementedError

    def flops_per_row_E(self) -> tuple[int, ...]:
        """Forward FLOPs of one row through each expert."""
        raise NotImplementedError

    def flops_per_token(self, rows_per_token: float, length: int) -> int:
        """Return the forward FLOPs of one token in a sequence of `length` at an even load: what is planned."""
        flops_E = self.flops_per_row_E()
        return int(rows_per_token * sum(flops_E) / len(flops_E))

    def executed_flops(self, record: LayerRecord) -> Tensor:
        """Return the forward FLOPs of the rows that the experts computed for a record, fp64 scalar."""
        flops_E, rows_E = self.flops_per_row_E(), record.kept.rows_E.double()
        if len(set(flops_E)) == 1:
            return rows_E.sum() * flops_E[0]
        return rows_E @ rows_E.new_tensor(flops_E)

    def mixture(
        self,
        x_TD: Tensor,
        routing: Routing,
        dropout: Dropout | None = None,
        while_in_flight: Callable[[], None] | None = None,
    ) -> Tensor:
        """Return y_TD: for each token the sum of its experts' outputs times their weights (0 when unserved)."""
        routing = routing.compact() if self.reads_loads else routing
        plan = DispatchPlan.of(routing)
        y_RD = self(dispatch(x_TD, plan), plan.groups.load_E, dropout, while_in_flight)
        return combine(y_RD, routing.weight_N, plan)


def local(parameter: Tensor) -> Tensor:
    """Return the part of a parameter that is on this process: all of it unless experts are spread."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def draw_experts(parameter: Tensor, std: float, generator: Generator) -> None:
    """Fill a stack of experts from a normal distribution, in place, drawing each expert in turn.

    A process that has only some of them draws the same numbers and keeps its own.
    """
    own_EX = local(parameter)
    first = own_EX.shape[0] * parameter.device_mesh.get_local_rank("expert") if isinstance(parameter, DTensor) else 0
    with torch.no_grad():
        for expert in range(parameter.shape[0]):
            drawn = torch.empty(own_EX.shape[1:], dtype=own_EX.dtype).normal_(std=std, generator=generator)
            if first <= expert < first + own_EX.shape[0]:
                own_EX[expert - first].copy_(drawn)


def merge(weight_GE: Tensor, stack_EIO: Tensor) -> Tensor:
    """Return each segment's sum of the experts' matrices, [G, I, O]: 2·E FLOPs per weight of one expert."""
    merged_GX = weight_GE.to(stack_EIO.dtype) @ stack_EIO.flatten(1)
    return merged_GX.view(-1, *stack_EIO.shape[1:])


def double_loop(bank: Bank, x_TD: Tensor, routing: Routing) -> Tensor:
    """Return Σ_e w_te E_e(x_t) by a loop over assignments: slow, obvious, the oracle beside the fast path."""
    routing = routing.compact()
    tokens = list(x_TD * 0)
    pairs = zip(routing.token_N.tolist(), routing.expert_N.tolist(), routing.weight_N, strict=True)
    for token, expert, weight in pairs:
        tokens[token] = tokens[token] + weight.to(x_TD.dtype) * bank.expert(x_TD[token], expert)
    return torch.stack(tokens) if tokens else x_TD * 0
