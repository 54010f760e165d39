"""Expert parallelism: send rows to the processes that hold their experts, and the results back."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from moebench.experts.bank import Compute
from moebench.parallel.collectives import AsyncAllToAll
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
        by_expert_R = _order_by_expert(received_WE)
        by_process_R = torch.empty_like(by_expert_R)
        by_process_R[by_expert_R] = torch.arange(len(by_expert_R), device=by_expert_R.device)
        rows_RI = permute_rows(dispatch.finish(in_flight_RI), by_expert_R, by_process_R)
        y_RO = permute_rows(compute(rows_RI, received_WE.sum(0)), by_process_R, by_expert_R)
        if while_in_flight is not None and not self.overlap:
            while_in_flight()
        combine = AsyncAllToAll(receive, send, self.group, self.traffic)
        return functional.pad(combine(y_RO), (0, 0, 0, x_RI.shape[0] - sum(send)))


def _order_by_expert(received_WE: Tensor) -> Tensor:
    """Return the stable order by expert of rows that are sorted by process and, within a process, by expert."""
    num_processes, num_experts = received_WE.shape
    expert_WE = torch.arange(num_experts, device=received_WE.device).repeat(num_processes)
    return expert_WE.repeat_interleave(received_WE.flatten()).argsort(stable=True)


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
