"""Copies of weights in the precision of autocast, made once for each value of a weight instead of at each use.

torch.autocast caches casts only within one context, which a training step enters for each micro-batch and each block
that is computed again, and sums the gradients of several uses in that precision. Here each use has its own gradient,
which is cast back to the precision of the weight before any sum, as by `weight.to(dtype)`: no number changes.

Copies belong to who trains or evaluates (`share_casts`), not to modules, so they are in no checkpoint. A copy is used
only while its weight is where it was and has not been written to since, as torch counts writes. It does not count
those of fused optimizers, of collectives and to `.data`: each update therefore ends with `clear`.
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
    """A copy of a weight, and what identifies the value that it was made of."""

    value: Tensor
    source: tuple[int, ...]


class WeightCasts:
    """The copies that the forward passes between two updates share."""

    def __init__(self) -> None:
        # Not by weak references: torch does not move sharded parameters that have some.
        self._copies: dict[Tensor, _Copy] = {}

    def cast(self, parameter: Tensor, local: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a copy of `local`, the part of a parameter that is on this process, without a gradient."""
        # An update of a sharded parameter is counted on the parameter or on its part.
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
"""The innermost last. Not for each thread: on a GPU, autograd computes blocks again in a thread of its own."""


@contextlib.contextmanager
def share_casts(casts: WeightCasts | None = None) -> Iterator[None]:
    """Let forward and backward passes inside share copies: `casts`, or without them those in use, or new ones."""
    if casts is None:
        casts = _IN_USE[-1] if _IN_USE else WeightCasts()
    _IN_USE.append(casts)
    try:
        yield
    finally:
        _IN_USE.pop()


def cast_weight(parameter: Tensor, local: Tensor) -> Tensor:
    """Return `local`, the part of a parameter that is on this process, in the precision of autocast.

    Unchanged where autocast is off. Outside of `share_casts` it is cast at each call, and so is what is no parameter.
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
    """The copy in place of the weight; its gradient is cast as the backward pass of a cast does."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return copy.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None
