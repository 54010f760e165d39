"""Copies of weights in the precision of autocast, made once for each value of a weight instead of at each use.

torch.autocast caches casts only within one context, which a training step enters for each micro-batch and each
recomputed block, and sums the gradients of several uses in that precision. Here each use has its own gradient, which is
cast back to the precision of the weight before any sum, as by `weight.to(dtype)`: no number changes.

Copies belong to the training or evaluation loop (`share_casts`), not to modules, so no checkpoint contains them. A copy
is valid while its weight has the same storage and version counter. torch's counter misses writes by fused optimizers,
by collectives and to `.data`, so each update ends with `clear`.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, kw_only=True, eq=False)
class _Copy:
    """A copy of a weight, and what identifies the value it was made from."""

    value: Tensor
    source: tuple[int, ...]


class WeightCasts:
    """The copies that are shared by the forward passes between two updates."""

    def __init__(self) -> None:
        # No weak references: torch does not move sharded parameters that have any.
        self._copies: dict[Tensor, _Copy] = {}

    def cast(self, parameter: Tensor, local: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a copy of `local`, the part of a parameter that is on this process, without a gradient."""
        # An update of a sharded parameter increments the version of the parameter or that of its local part.
        source = parameter._version, local._version, local.data_ptr()
        copy = self._copies.get(parameter)
        if copy is None or copy.source != source or copy.value.dtype != dtype or copy.value.device != local.device:
            self._copies.pop(parameter, None)  # its memory is free before the new copy is made
            copy = _Copy(value=local.detach().to(dtype), source=source)
            self._copies[parameter] = copy
        return copy.value

    def clear(self) -> None:
        """Drop all copies: before an update, which can use their memory, and after it, whose writes are not counted."""
        self._copies.clear()


_IN_USE: list[WeightCasts] = []
"""A stack, the innermost last. Not thread-local: on a GPU, autograd recomputes blocks in a thread of its own."""


@contextlib.contextmanager
def share_casts(casts: WeightCasts | None = None) -> Iterator[None]:
    """Share copies between the forward and backward passes in the block.

    `casts`: None: those of the enclosing block, or new ones.
    """
    if casts is None:
        casts = _IN_USE[-1] if _IN_USE else WeightCasts()
    _IN_USE.append(casts)
    try:
        yield
    finally:
        _IN_USE.pop()


def cast_weight(parameter: Tensor, local: Tensor) -> Tensor:
    """Return `local`, the part of a parameter that is on this process, in the precision of autocast.

    Unchanged if autocast is off. Outside of `share_casts`, and for a tensor that is not a parameter, each call casts.
    """
    device = local.device.type
    if not torch.is_autocast_enabled(device):
        return local
    dtype = torch.get_autocast_dtype(device)
    if torch.compiler.is_compiling() or not _IN_USE or not isinstance(parameter, nn.Parameter) or local.dtype == dtype:
        return local.to(dtype)
    copy = _IN_USE[-1].cast(parameter, local, dtype)
    if not (torch.is_grad_enabled() and local.requires_grad):
        return copy
    weight: Tensor = _UseCopy.apply(local, copy)  # type: ignore[no-untyped-call]
    return weight


class _UseCopy(torch.autograd.Function):
    """Replace a weight by its copy; the gradient is cast to the type of the weight, as in the backward of a cast."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return copy.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None
