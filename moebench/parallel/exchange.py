"""Expert parallelism: send rows to the processes that hold their experts, and the results back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from moebench.experts.bank import Compute, WeightedCompute
from moebench.parallel.collectives import AsyncAllToAll
from moebench.parallel.packed_rows import pack_rows, unpack_rows
from moebench.parallel.traffic import Traffic


class ExpertExchange:
    """Dispatches rows, sorted by expert, to the processes of an expert group by all-to-all, and combines the results.

    Process p of the group holds experts p·e ... (p+1)·e - 1. It sorts the rows that it receives by expert and, for one
    expert, by sender, which is the order of tokens: the order in which a single process computes them.
    """

    def __init__(self, group: dist.ProcessGroup, traffic: Traffic, *, overlap: bool) -> None:
        """`overlap`: call `while_in_flight` while the rows are in flight, else after the experts."""
        self.group = group
        self.traffic = traffic
        self.overlap = overlap

    def count_sent_rows(self, rows_E: Tensor) -> int:
        """Count the rows that this process sends to others, given its rows for each expert."""
        rows_WE = rows_E.view(self.group.size(), -1)
        return int(rows_WE.sum() - rows_WE[self.group.rank()].sum())

    def count_local_rows(self, rows_E: Tensor) -> int:
        """Count the rows for experts of this process, given the rows for each expert."""
        return int(rows_E.view(self.group.size(), -1)[self.group.rank()].sum())

    def __call__(
        self, compute: Compute, x_RI: Tensor, load_E: Tensor, while_in_flight: Callable[[], None] | None = None
    ) -> Tensor:
        """Compute each row with its expert, wherever that is, and return y_RO; rows beyond the load come back as 0."""

        def compute_received(received_RI: Tensor, order: RowOrder, received_E: Tensor) -> Tensor:
            return compute(permute_rows(received_RI, order.by_expert_R, order.by_process_R), received_E)

        return self._exchange(compute_received, x_RI, load_E, while_in_flight)

    def compute_weighted(
        self,
        compute: WeightedCompute,
        rows: tuple[Tensor, Tensor],
        load_E: Tensor,
        while_in_flight: Callable[[], None] | None = None,
    ) -> Tensor:
        """Do the same with `rows`, x_RI and weight_R; the experts multiply their outputs with the weights."""
        x_RI, weight_R = rows

        def compute_received(received_RP: Tensor, order: RowOrder, received_E: Tensor) -> Tensor:
            return compute(*unpack_rows(received_RP, weight_R.dtype, order.by_expert_R, order.by_process_R), received_E)

        return self._exchange(compute_received, pack_rows(x_RI, weight_R), load_E, while_in_flight)

    def _exchange(
        self,
        compute_received: Callable[[Tensor, "RowOrder", Tensor], Tensor],
        x_RI: Tensor,
        load_E: Tensor,
        while_in_flight: Callable[[], None] | None,
    ) -> Tensor:
        """Send rows, compute those received, sorted by process, and return what comes back.

        `compute_received`: gets the received rows, their order and the load, and returns its rows sorted by expert.
        """
        size = self.group.size()
        sent_WE = load_E.view(size, -1)
        received_WE = torch.empty_like(sent_WE)
        dist.all_to_all_single(received_WE, sent_WE.contiguous(), group=self.group)
        # The host must know how many rows to send and receive: each layer's only synchronization with the GPU.
        counts = torch.stack([sent_WE.sum(1), received_WE.sum(1)]).tolist()
        send, receive = [int(n) for n in counts[0]], [int(n) for n in counts[1]]
        dispatch = AsyncAllToAll(send, receive, self.group, self.traffic)
        in_flight_RI = dispatch.start(x_RI[: sum(send)])
        if while_in_flight is not None and self.overlap:
            while_in_flight()
        order = RowOrder.of(received_WE, sum(receive))
        sorted_RO = compute_received(dispatch.finish(in_flight_RI), order, received_WE.sum(0))
        y_RO = permute_rows(sorted_RO, order.by_process_R, order.by_expert_R)
        if while_in_flight is not None and not self.overlap:
            while_in_flight()
        combine = AsyncAllToAll(receive, send, self.group, self.traffic)
        return functional.pad(combine(y_RO), (0, 0, 0, x_RI.shape[0] - sum(send)))


@dataclass(frozen=True, eq=False)
class RowOrder:
    """The order by expert of rows that are sorted by process and, within a process, by expert; and its inverse."""

    by_expert_R: Tensor
    by_process_R: Tensor

    @classmethod
    def of(cls, received_WE: Tensor, num_rows: int) -> "RowOrder":
        """Return the stable order, given the rows from each process for each expert, and their number."""
        # Rows of one process and expert are a block in both orders: it moves as a whole, and nothing is sorted.
        received_EW = received_WE.T
        start_WE, start_EW = _find_starts(received_WE), _find_starts(received_EW)
        shift_EW = start_WE.T - start_EW
        place_R = torch.arange(num_rows, device=received_WE.device)
        return cls(
            by_expert_R=place_R + _repeat_blocks(shift_EW, received_EW, num_rows),
            by_process_R=place_R - _repeat_blocks(shift_EW.T, received_WE, num_rows),
        )


def _find_starts(length_AB: Tensor) -> Tensor:
    """Return the start of each block, of blocks that lie one after another."""
    return (length_AB.flatten().cumsum(0) - length_AB.flatten()).view(length_AB.shape)


def _repeat_blocks(value_AB: Tensor, length_AB: Tensor, num_rows: int) -> Tensor:
    """Return the value of each row's block."""
    return value_AB.flatten().repeat_interleave(length_AB.flatten(), output_size=num_rows)


def permute_rows(x_RI: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
    """Return the rows in the given order; the gradient is a gather as well, by the inverse order."""
    rows_RI: Tensor = _PermuteRows.apply(x_RI, order_R, inverse_R)  # type: ignore[no-untyped-call]
    return rows_RI


class _PermuteRows(torch.autograd.Function):
    """Gather of all rows by an order, whose backward gathers by the inverse instead of scattering."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_R)
        return x_RI.index_select(0, order_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RI: Tensor) -> tuple[Tensor, None, None]:
        (inverse_R,) = ctx.saved_tensors
        return grad_RI.index_select(0, inverse_R), None, None
