"""Rows that carry their weights in their last columns, bit for bit, so that one all-to-all sends both."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def pack_rows(x_RI: Tensor, weight_R: Tensor) -> Tensor:
    """Return the rows with a weight behind each: one column in fp32, two in bf16, which hold the bits of an fp32."""
    packed_RP: Tensor = _Pack.apply(x_RI, weight_R)  # type: ignore[no-untyped-call]
    return packed_RP


def unpack_rows(
    packed_RP: Tensor, weight_dtype: torch.dtype, order_R: Tensor, inverse_R: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the rows and their weights in the given order; `inverse_R`: the inverse of the order."""
    x_RI, weight_R = _Unpack.apply(packed_RP, weight_dtype, order_R, inverse_R)  # type: ignore[no-untyped-call]
    return x_RI, weight_R


def _join(x_RI: Tensor, weight_R: Tensor) -> Tensor:
    num_columns = weight_R.dtype.itemsize // x_RI.dtype.itemsize
    return torch.cat([x_RI, weight_R.contiguous().view(x_RI.dtype).view(x_RI.shape[0], num_columns)], dim=1)


def _split(packed_RP: Tensor, weight_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return views of the rows and of the columns of their weights."""
    width = packed_RP.shape[1] - weight_dtype.itemsize // packed_RP.dtype.itemsize
    return packed_RP[:, :width], packed_RP[:, width:]


class _Pack(torch.autograd.Function):
    """The gradient of a weight comes back in the columns of the weights."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, weight_R: Tensor) -> Tensor:
        ctx.weight_dtype = weight_R.dtype
        return _join(x_RI, weight_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RP: Tensor) -> tuple[Tensor, Tensor]:
        grad_RI, grad_RC = _split(grad_RP, ctx.weight_dtype)
        return grad_RI.contiguous(), grad_RC.contiguous().view(ctx.weight_dtype).view(-1)


class _Unpack(torch.autograd.Function):
    """A gather forward, and a gather by the inverse order backward."""

    @staticmethod
    def forward(
        ctx: Any, packed_RP: Tensor, weight_dtype: torch.dtype, order_R: Tensor, inverse_R: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(inverse_R)
        rows_RI, weight_RC = (part.index_select(0, order_R) for part in _split(packed_RP, weight_dtype))
        return rows_RI, weight_RC.view(weight_dtype).view(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RI: Tensor, grad_R: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_R,) = ctx.saved_tensors
        return _join(grad_RI, grad_R).index_select(0, inverse_R), None, None, None
