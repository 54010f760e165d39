"""Differentiable collectives: the sums, gathers and all-to-alls that losses and expert layers need."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from moebench.ranks import check_device


class CollectiveObserver:
    """Issues all-to-alls and is told of other collectives; a subclass measures them (see `parallel.traffic`)."""

    def all_to_all(
        self, out_RI: Tensor, x_RI: Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup
    ) -> Any:
        """Start an all-to-all and return its work handle, or None when it has finished."""
        return dist.all_to_all_single(out_RI, x_RI, receive, send, group=group, async_op=True)

    def count_collective(self, num_bytes: int) -> None:
        """Count a sum or a gather that leaves `num_bytes` on this process."""


@dataclass(frozen=True, eq=False)
class GroupRanks:
    """The `Ranks` of a process group."""

    group: dist.ProcessGroup
    device: torch.device | None = None
    """Device that values must be on; None: any."""
    observer: CollectiveObserver = field(default_factory=CollectiveObserver)

    @property
    def size(self) -> int:
        """Number of processes in the group."""
        return self.group.size()

    @property
    def rank(self) -> int:
        """Rank within the group."""
        return self.group.rank()

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum over ranks; see `Ranks.sum`."""
        check_device(value, self.device)
        summed: Tensor = _Sum.apply(value, self)  # type: ignore[no-untyped-call]
        return summed

    def gather(self, value_T: Tensor, lengths: Sequence[int] = ()) -> Tensor:
        """Return the values of all ranks, concatenated; see `Ranks.gather`."""
        check_device(value_T, self.device)
        if value_T.dtype == torch.bool:
            return self.gather(value_T.to(torch.uint8), lengths).bool()
        gathered: Tensor = _Gather.apply(value_T, self, tuple(lengths))  # type: ignore[no-untyped-call]
        return gathered

    def all_reduce(self, value: Tensor) -> Tensor:
        """Return the sum over ranks, without gradient."""
        summed = value.clone()
        self.observer.count_collective(summed.nbytes)
        dist.all_reduce(summed, group=self.group)
        return summed

    def all_gather(self, value: Tensor) -> Tensor:
        """Return the values of all ranks, [W, ...], which have one shape, without gradient."""
        gathered_W = value.new_empty(self.size, *value.shape)
        self.observer.count_collective(gathered_W.nbytes)
        dist.all_gather_into_tensor(gathered_W.view(-1), value.reshape(-1), group=self.group)
        return gathered_W


class _Sum(torch.autograd.Function):
    """Sum over ranks; the gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, ranks: GroupRanks) -> Tensor:
        ctx.ranks = ranks
        return ranks.all_reduce(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.all_reduce(grad), None


class _Gather(torch.autograd.Function):
    """Concatenation over ranks along the first dimension; lengths may differ.

    The gradient of a rank's part is the sum over ranks of the gradients of that part.
    """

    @staticmethod
    def forward(ctx: Any, value_T: Tensor, ranks: GroupRanks, lengths: tuple[int, ...]) -> Tensor:
        if not lengths:
            length = torch.full((1,), value_T.shape[0], device=value_T.device)
            lengths = tuple(int(number) for number in ranks.all_gather(length).flatten().tolist())
        if lengths[ranks.rank] != value_T.shape[0]:
            raise ValueError(f"rank {ranks.rank} gathers {value_T.shape[0]} elements, of {lengths} that were announced")
        ctx.ranks, ctx.start, ctx.length = ranks, sum(lengths[: ranks.rank]), value_T.shape[0]
        if min(lengths) == max(lengths):
            return ranks.all_gather(value_T).flatten(0, 1)
        padded_T = value_T.new_zeros(max(lengths), *value_T.shape[1:])
        padded_T[: value_T.shape[0]] = value_T
        all_WT = ranks.all_gather(padded_T)
        return torch.cat([rank_T[:length] for rank_T, length in zip(all_WT, lengths, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None, None]:
        summed_T = ctx.ranks.all_reduce(grad_T)
        return summed_T[ctx.start : ctx.start + ctx.length], None, None


class AsyncAllToAll:
    """One all-to-all of rows that overlaps with the computation between `start` and `finish`.

    The backward pass overlaps too: the gradient is sent back in the backward of `finish` and awaited in the backward
    of `start`, so that the computation between them is differentiated while the gradient is in flight.
    """

    def __init__(
        self, send: list[int], receive: list[int], group: dist.ProcessGroup, observer: CollectiveObserver
    ) -> None:
        """`send` and `receive`: number of rows for and from each process of the group."""
        self.send, self.receive, self.group, self.observer = send, receive, group, observer
        self.work: Any = None
        self.gradient_RI: Tensor | None = None

    def start(self, x_RI: Tensor) -> Tensor:
        """Send the rows; the returned tensor must not be read before `finish`."""
        received: Tensor = _Start.apply(x_RI, self)  # type: ignore[no-untyped-call]
        return received

    def finish(self, x_RI: Tensor) -> Tensor:
        """Wait for the rows of `start` and return them."""
        received: Tensor = _Finish.apply(x_RI, self)  # type: ignore[no-untyped-call]
        return received

    def __call__(self, x_RI: Tensor) -> Tensor:
        """Send the rows and return the received ones, without overlap."""
        return self.finish(self.start(x_RI))

    def issue(self, x_RI: Tensor, *, is_backward: bool) -> Tensor:
        """Start the all-to-all, in the backward pass from the receivers to the senders."""
        to_send, to_receive = (self.receive, self.send) if is_backward else (self.send, self.receive)
        out_RI = x_RI.new_empty(sum(to_receive), *x_RI.shape[1:])
        self.work = self.observer.all_to_all(out_RI, x_RI.contiguous(), to_receive, to_send, self.group)
        return out_RI

    def take_gradient(self) -> Tensor:
        """Wait for the gradient of the sent rows and return it."""
        assert self.gradient_RI is not None
        self.wait()
        gradient_RI, self.gradient_RI = self.gradient_RI, None
        return gradient_RI

    def wait(self) -> None:
        """Wait for the all-to-all that was issued last."""
        if self.work is not None:
            self.work.wait()
        self.work = None


class _Start(torch.autograd.Function):
    """The sending half of an all-to-all."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, exchange: AsyncAllToAll) -> Tensor:
        ctx.exchange = exchange
        return exchange.issue(x_RI, is_backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RI: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.take_gradient(), None


class _Finish(torch.autograd.Function):
    """The waiting half of an all-to-all."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, exchange: AsyncAllToAll) -> Tensor:
        ctx.exchange = exchange
        exchange.wait()
        return x_RI.view_as(x_RI)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RI: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.gradient_RI = ctx.exchange.issue(grad_RI, is_backward=True)
        # The gradient in flight has another shape than autograd expects here and is returned by `take_gradient`.
        return grad_RI.new_zeros(()).expand(grad_RI.shape), None
