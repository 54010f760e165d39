"""Sums and gathers over processes, differentiable: what losses and layers call through `routing.ranks.Ranks`."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from moebench.ranks import check_device


@dataclass(frozen=True, eq=False)
class GroupRanks:
    """The processes of a group."""

    group: dist.ProcessGroup
    device: torch.device | None = None
    """Where the values of this process must be; None: anywhere."""

    @property
    def size(self) -> int:
        """How many there are."""
        return self.group.size()

    @property
    def rank(self) -> int:
        """Which of them this one is."""
        return self.group.rank()

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum over ranks; see `Ranks.sum`."""
        check_device(value, self.device)
        summed: Tensor = _Sum.apply(value, self.group)  # type: ignore[no-untyped-call]
        return summed

    def gather(self, value_T: Tensor) -> Tensor:
        """Return the values of all ranks, joined; see `Ranks.gather`."""
        check_device(value_T, self.device)
        if value_T.dtype == torch.bool:
            return self.gather(value_T.to(torch.uint8)).bool()
        joined: Tensor = _Gather.apply(value_T, self.group)  # type: ignore[no-untyped-call]
        return joined


class _Sum(torch.autograd.Function):
    """Sum over ranks; the gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        summed = value.clone()
        dist.all_reduce(summed, group=group)
        return summed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        summed = grad.clone()
        dist.all_reduce(summed, group=ctx.group)
        return summed, None


class _Gather(torch.autograd.Function):
    """Join along the first dimension; the gradient of a rank's part is the sum of what all ranks say about it."""

    @staticmethod
    def forward(ctx: Any, value_T: Tensor, group: dist.ProcessGroup) -> Tensor:
        lengths = _lengths(value_T, group)
        ctx.group, ctx.start, ctx.length = group, sum(lengths[: group.rank()]), value_T.shape[0]
        padded_T = value_T.new_zeros(max(lengths), *value_T.shape[1:])
        padded_T[: value_T.shape[0]] = value_T
        all_WT = value_T.new_empty(group.size(), *padded_T.shape)
        dist.all_gather_into_tensor(all_WT.flatten(0, 1), padded_T, group=group)
        return torch.cat([own_T[:length] for own_T, length in zip(all_WT, lengths, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None]:
        summed_T = grad_T.clone()
        dist.all_reduce(summed_T, group=ctx.group)
        return summed_T[ctx.start : ctx.start + ctx.length], None


def _lengths(value_T: Tensor, group: dist.ProcessGroup) -> list[int]:
    length = torch.tensor([value_T.shape[0]], device=value_T.device)
    lengths = length.new_empty(group.size())
    dist.all_gather_into_tensor(lengths, length, group=group)
    return [int(number) for number in lengths.tolist()]


class AsyncAllToAll:
    """Rows on their way between processes: `start` sends, `finish` waits; what is done between costs no time.

    Backward the same way in the other direction: the gradient starts where the rows were waited for and is waited
    for where they were sent, so that whatever was computed between is differentiated while it travels.
    """

    def __init__(self, send: list[int], receive: list[int], group: dist.ProcessGroup, watch: "Watch") -> None:
        """`send` and `receive`: rows for and from each process."""
        self.send, self.receive, self.group, self.watch = send, receive, group, watch
        self.work: Any = None
        self.gradient_RI: Tensor | None = None

    def start(self, x_RI: Tensor) -> Tensor:
        """Send the rows; what is returned may be read after `finish` alone."""
        received: Tensor = _Start.apply(x_RI, self)  # type: ignore[no-untyped-call]
        return received

    def finish(self, x_RI: Tensor) -> Tensor:
        """Wait for the rows and return them."""
        received: Tensor = _Finish.apply(x_RI, self)  # type: ignore[no-untyped-call]
        return received

    def __call__(self, x_RI: Tensor) -> Tensor:
        """Send the rows and return what came."""
        return self.finish(self.start(x_RI))

    def issue(self, x_RI: Tensor, *, back: bool) -> Tensor:
        """Begin an all-to-all; `back`: from the receivers to the senders."""
        to_send, to_receive = (self.receive, self.send) if back else (self.send, self.receive)
        out_RI = x_RI.new_empty(sum(to_receive), *x_RI.shape[1:])
        self.work = self.watch.all_to_all(out_RI, x_RI.contiguous(), to_receive, to_send, self.group)
        return out_RI

    def returned(self) -> Tensor:
        """Wait for the gradient that comes back and return it."""
        assert self.gradient_RI is not None
        self.wait()
        gradient_RI, self.gradient_RI = self.gradient_RI, None
        return gradient_RI

    def wait(self) -> None:
        """Wait for the all-to-all that was begun last."""
        if self.work is not None:
            self.work.wait()
        self.work = None


class Watch:
    """How an all-to-all is issued; `parallel.traffic` measures it."""

    def all_to_all(
        self, out_RI: Tensor, x_RI: Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup
    ) -> Any:
        """Issue it and return what to wait for, None when nothing is left to wait for."""
        return dist.all_to_all_single(out_RI, x_RI, receive, send, group=group, async_op=True)


class _Start(torch.autograd.Function):
    """The first half of an all-to-all."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, travel: AsyncAllToAll) -> Tensor:
        ctx.travel = travel
        return travel.issue(x_RI, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RI: Tensor) -> tuple[Tensor, None]:
        return ctx.travel.returned(), None


class _Finish(torch.autograd.Function):
    """The second half."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, travel: AsyncAllToAll) -> Tensor:
        ctx.travel = travel
        travel.wait()
        return x_RI.view_as(x_RI)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RI: Tensor) -> tuple[Tensor, None]:
        ctx.travel.gradient_RI = ctx.travel.issue(grad_RI, back=True)
        # What travels has another shape than what autograd expects here, so it goes round: see `returned`.
        return grad_RI.new_zeros(()).expand(grad_RI.shape), None
