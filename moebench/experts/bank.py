"""A bank: E experts and how they compute the assignments of a routing. Kinds of banks differ in what an expert is."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeGuard

import torch
from torch import Generator, Tensor, nn

from moebench.experts.activation import Dropout
from moebench.experts.dispatch import DispatchPlan, combine, dispatch
from moebench.experts.grouped import cast_for_autocast
from moebench.experts.weight_casts import cast_weight
from moebench.routing.constants import build_constant_like
from moebench.routing.values import LayerRecord, Routing

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Compute = Callable[[Tensor, Tensor], Tensor]
"""(x_RI, load_E) -> y_RO: experts on rows that are sorted by expert."""
WeightedCompute = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_RI, weight_R, load_E) -> y_RO: the same, each row's output times its weight."""


class Exchange(Protocol):
    """Sends rows to experts on other processes and brings the results back; `parallel` has the implementation."""

    def __call__(
        self, compute: Compute, x_RI: Tensor, load_E: Tensor, while_in_flight: Callable[[], None] | None = None
    ) -> Tensor:
        """Return y_RO for rows sorted by expert: each computed by `compute` on the process of its expert.

        `while_in_flight` is called once, while the rows are on their way.
        """

    def compute_weighted(
        self,
        compute: WeightedCompute,
        rows: tuple[Tensor, Tensor],
        load_E: Tensor,
        while_in_flight: Callable[[], None] | None = None,
    ) -> Tensor:
        """Return the same with `rows`, x_RI and weight_R, whose weights are sent with them."""

    def count_sent_rows(self, rows_E: Tensor) -> int:
        """Return how many rows leave this process, from `rows_E` for each expert."""

    def count_local_rows(self, rows_E: Tensor) -> int:
        """Return how many rows are for the experts of this process, from `rows_E` for each expert."""


class Bank(nn.Module):
    """E experts x_D -> y_D behind one way of computing a routing: dispatch, the experts on sorted rows, combine.

    A kind of expert defines `rows`, `expert`, `flops_per_row_E` and `init_weights`; one with a faster way than row by
    row overrides `mixture`. Where the experts are sharded over processes, `rows` computes those of this process.
    """

    num_experts: int
    """Experts of all processes together."""
    needs_loads_on_host: ClassVar[bool] = False
    """Whether Python needs the number of rows of each expert: the host then waits for the device."""
    is_replicated: ClassVar[bool] = False
    """Whether every process has all the experts even if other banks are sharded: computing is cheaper than sending."""
    exchange: Exchange | None = None
    """Brings rows to their experts where these are sharded over processes; None: all are on this process."""

    def forward(
        self,
        x_RD: Tensor,
        load_E: Tensor,
        dropout: Dropout | None = None,
        while_in_flight: Callable[[], None] | None = None,
    ) -> Tensor:
        """Return y_RD for rows sorted by expert, on whichever process their experts are."""
        return self.compute_at_experts(partial(self.rows, dropout=dropout), x_RD, load_E, while_in_flight)

    def compute_at_experts(
        self, compute: Compute, x_RI: Tensor, load_E: Tensor, while_in_flight: Callable[[], None] | None = None
    ) -> Tensor:
        """Return `compute(x_RI, load_E)`, each row computed on the process of its expert (see `Exchange`)."""
        if self.exchange is None:
            return compute(x_RI, load_E)
        (x_RI,) = cast_for_autocast(x_RI)  # rows are multiplied in that precision anyway: half the bytes to send
        return self.exchange(compute, x_RI, load_E, while_in_flight)

    def init_weights(self, generator: Generator) -> None:
        """Initialise the weights of all experts; banks made of modules that initialise themselves have none."""

    def rows(self, x_RD: Tensor, load_E: Tensor, dropout: Dropout | None = None) -> Tensor:
        """Return y_RD: the first load_E[0] rows through expert 0, the next through expert 1, and so on.

        `dropout` is for hidden activations inside the experts.
        """
        raise NotImplementedError

    def elements_per_row(self) -> int:
        """Return the elements that a row for another process carries, there and back; 0 for replicated banks."""
        return 0

    def elements_sent(self, rows_E: Tensor) -> int:
        """Return the elements that a forward pass sends to other processes, from `rows_E` for each expert."""
        return 0 if self.exchange is None else self.exchange.count_sent_rows(rows_E) * self.elements_per_row()

    def sends_weights(self, *, has_dropout: bool) -> bool:
        """Return whether rows of a list of assignments carry their weights to other processes, and gradients back."""
        return False

    def count_computed_rows(self, own_E: Tensor, shared_E: Tensor) -> int:
        """Return how many rows this process computes.

        `own_E`: rows of its own tokens for each expert. `shared_E`: rows of all processes that share the experts.
        """
        return int(own_E.sum()) if self.exchange is None else self.exchange.count_local_rows(shared_E)

    def expert(self, x_RD: Tensor, index: int) -> Tensor:
        """Return the output of one expert: slow, for reference computations."""
        raise NotImplementedError

    def compute_merged(self, x_GSD: Tensor, weight_GE: Tensor, dropout: Dropout | None = None) -> Tensor:
        """Return y_GSD: the rows of each segment through one network with the parameters Σ_e w_ge θ_e.

        Only experts of one shape have such a sum; a plan with others is refused for routers that merge.
        """
        raise NotImplementedError

    def flops_per_row_E(self) -> tuple[int, ...]:
        """Return the forward FLOPs of one row through each expert."""
        raise NotImplementedError

    def flops_per_token(self, rows_per_token: float, length: int) -> int:
        """Return the planned forward FLOPs of one token in a sequence of `length`: at an even load."""
        flops_E = self.flops_per_row_E()
        return int(rows_per_token * sum(flops_E) / len(flops_E))

    def executed_flops(self, record: LayerRecord) -> Tensor:
        """Return the forward FLOPs of the rows that the experts computed for a record, fp64 scalar."""
        flops_E, rows_E = self.flops_per_row_E(), record.kept.rows_E.double()
        if len(set(flops_E)) == 1:
            return rows_E.sum() * flops_E[0]
        return rows_E @ build_constant_like(flops_E, rows_E)

    def mixture(
        self,
        x_TD: Tensor,
        routing: Routing,
        dropout: Dropout | None = None,
        while_in_flight: Callable[[], None] | None = None,
    ) -> Tensor:
        """Return y_TD: for each token the sum of its experts' outputs times their weights (0 when unserved)."""
        routing = routing.compact() if self.needs_loads_on_host else routing
        plan = DispatchPlan.of(routing)
        y_RD = self(dispatch(x_TD, plan), plan.groups.load_E, dropout, while_in_flight)
        return combine(y_RD, routing.weight_N, plan)


def local_shard(parameter: Tensor) -> Tensor:
    """Return the part of a parameter that is on this process: all of it unless experts are sharded."""
    return parameter.to_local() if is_sharded(parameter) else parameter


def read_weight(parameter: Tensor) -> Tensor:
    """Return the part of a parameter that is on this process, as products read it: in the precision of autocast."""
    return cast_weight(parameter, local_shard(parameter))


def is_sharded(parameter: Tensor) -> "TypeGuard[DTensor]":
    """Return whether a parameter is a `DTensor`, without importing that class, which takes as long as half of torch."""
    return hasattr(parameter, "device_mesh")


def init_experts(parameter: Tensor, std: float, generator: Generator) -> None:
    """Fill a stack of experts from a normal distribution, in place, drawing each expert in turn.

    A process that has only some of them draws the same values and keeps those of its own experts.
    """
    local_EX = local_shard(parameter)
    num_local = local_EX.shape[0]
    first = num_local * parameter.device_mesh.get_local_rank("expert") if is_sharded(parameter) else 0
    with torch.no_grad():
        for expert in range(parameter.shape[0]):
            value_X = torch.empty(local_EX.shape[1:], dtype=local_EX.dtype).normal_(std=std, generator=generator)
            if first <= expert < first + num_local:
                local_EX[expert - first].copy_(value_X)


def merge_weights(weight_GE: Tensor, stack_EIO: Tensor) -> Tensor:
    """Return each segment's sum of the experts' matrices, [G, I, O]: 2·E FLOPs per weight of one expert."""
    merged_GX = weight_GE.to(stack_EIO.dtype) @ stack_EIO.flatten(1)
    return merged_GX.view(-1, *stack_EIO.shape[1:])
