"""The way of rows to experts that live in other processes, and back."""

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
    """Rows sorted by expert go to the process of their expert by an all-to-all with uneven parts, and come back.

    Process p of the group has the experts p·e ... (p+1)·e - 1. What it receives it sorts by expert, within an expert
    by process and so by token: the order in which one process alone would compute them.
    """

    def __init__(self, group: dist.ProcessGroup, traffic: Traffic, *, overlap: bool) -> None:
        """`overlap`: call `while_in_flight` while the rows travel, else behind."""
        self.group = group
        self.traffic = traffic
        self.overlap = overlap

    def count_sent_rows(self, rows_E: Tensor) -> int:
        """Return how many rows leave this process, of `rows_E` for each expert."""
        rows_WE = rows_E.view(self.group.size(), -1)
        return int(rows_WE.sum() - rows_WE[self.group.rank()].sum())

    def count_local_rows(self, rows_E: Tensor) -> int:
        """Return how many rows are for the experts of this process, of `rows_E` for each expert."""
        return int(rows_E.view(self.group.size(), -1)[self.group.rank()].sum())

    def __call__(
        self, compute: Compute, x_RI: Tensor, load_E: Tensor, while_in_flight: Callable[[], None] | None = None
    ) -> Tensor:
        """Return y_RO, each row computed where its expert is; rows behind the last expert's come back as 0."""
        size = self.group.size()
        sent_WE = load_E.view(size, -1)
        received_WE = torch.empty_like(sent_WE)
        dist.all_to_all_single(received_WE, sent_WE.contiguous(), group=self.group)
        # The lengths of the parts must be known on the host: the one wait for a GPU in each layer.
        counts = torch.stack([sent_WE.sum(1), received_WE.sum(1)]).tolist()
        send, receive = [int(n) for n in counts[0]], [int(n) for n in counts[1]]
        travel = AsyncAllToAll(send, receive, self.group, self.traffic)
        started = travel.start(x_RI[: sum(send)])
        if while_in_flight is not None and self.overlap:
            while_in_flight()
        by_expert_R = _by_expert(received_WE)
        by_process_R = torch.empty_like(by_expert_R)
        by_process_R[by_expert_R] = torch.arange(len(by_expert_R), device=by_expert_R.device)
        rows_RI = permuted(travel.finish(started), by_expert_R, by_process_R)
        y_RO = permuted(compute(rows_RI, received_WE.sum(0)), by_process_R, by_expert_R)
        if while_in_flight is not None and not self.overlap:
            while_in_flight()
        y_RO = AsyncAllToAll(receive, send, self.group, self.traffic)(y_RO)
        return functional.pad(y_RO, (0, 0, 0, x_RI.shape[0] - sum(send)))


def _by_expert(received_WE: Tensor) -> Tensor:
    """Return the order that sorts rows by expert which lie by process, within a process by expert."""
    num_processes, num_experts = received_WE.shape
    expert_WE = torch.arange(num_experts, device=received_WE.device).repeat(num_processes)
    return expert_WE.repeat_interleave(received_WE.flatten()).argsort(stable=True)


def permuted(x_RI: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
    """Return the rows in another order; the gradient comes by a gather too, not by a scatter."""
    rows_RI: Tensor = _Permuted.apply(x_RI, order_R, inverse_R)  # type: ignore[no-untyped-call]
    return rows_RI


class _Permuted(torch.autograd.Function):
    """Rows in a given order."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_R)
        return x_RI.index_select(0, order_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RI: Tensor) -> tuple[Tensor, None, None]:
        (inverse_R,) = ctx.saved_tensors
        return grad_RI.index_select(0, inverse_R), None, None
