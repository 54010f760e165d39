"""Activations of hidden units by torch's operators: silu of the first half times the second half (gated), or gelu."""

import torch
from torch import Tensor

from moebench.experts.kernels.rows import dot_rows

aten = torch.ops.aten


def activate(hidden_RF: Tensor, *, gated: bool) -> Tensor:
    """Return gelu of the hidden units, or silu of their first half times the second half."""
    return activate_in_parts(hidden_RF, gated=gated)[0]


def activate_in_parts(hidden_RF: Tensor, *, gated: bool, keep: bool = False) -> tuple[Tensor, Tensor]:
    """Return the activation and its expensive part: silu of the first half, or all of gelu.

    The second is valid only with `keep`.
    """
    if not gated:
        active_RF: Tensor = aten.gelu.default(hidden_RF)
        return active_RF, active_RF
    gate_RF, value_RF = hidden_RF.chunk(2, dim=-1)
    silu_RF: Tensor = aten.silu.default(gate_RF)
    return silu_RF * value_RF if keep else silu_RF.mul_(value_RF), silu_RF


def activate_backward(grad_RF: Tensor, hidden_RF: Tensor, *, gated: bool) -> Tensor:
    """Return the gradient of the hidden units."""
    if not gated:
        grad_hidden_RF: Tensor = aten.gelu_backward.default(grad_RF, hidden_RF)
        return grad_hidden_RF
    silu_RF = aten.silu.default(hidden_RF.chunk(2, dim=-1)[0])
    return _gated_backward(grad_RF, silu_RF, hidden_RF, product_RF=silu_RF)


def backward_with_inner(
    grad_RF: Tensor, hidden_RF: Tensor, expensive_RF: Tensor | None, inner_dtype: torch.dtype, *, gated: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of the hidden units, the activation, and the inner product of activation and gradient.

    `expensive_RF`: what `activate_in_parts` kept; None: it is computed again. `grad_RF` is overwritten.
    """
    if not gated:
        active_RF: Tensor = aten.gelu.default(hidden_RF) if expensive_RF is None else expensive_RF
        inner_R = dot_rows(active_RF, grad_RF, inner_dtype)
        return aten.gelu_backward.grad_input(grad_RF, hidden_RF, grad_input=grad_RF), active_RF, inner_R
    gate_RF, value_RF = hidden_RF.chunk(2, dim=-1)
    silu_RF: Tensor = aten.silu.default(gate_RF) if expensive_RF is None else expensive_RF
    active_RF = silu_RF * value_RF
    inner_R = dot_rows(active_RF, grad_RF, inner_dtype)
    return _gated_backward(grad_RF, silu_RF, hidden_RF, product_RF=grad_RF), active_RF, inner_R


def _gated_backward(grad_RF: Tensor, silu_RF: Tensor, hidden_RF: Tensor, *, product_RF: Tensor) -> Tensor:
    """Return the gradient of the hidden units; `product_RF`: memory for a product, which may be that of the others."""
    gate_RF, value_RF = hidden_RF.chunk(2, dim=-1)
    grad_hidden_RF = torch.empty_like(hidden_RF)
    grad_gate_RF, grad_value_RF = grad_hidden_RF.chunk(2, dim=-1)
    torch.mul(silu_RF, grad_RF, out=grad_value_RF)
    torch.mul(grad_RF, value_RF, out=product_RF)
    aten.silu_backward.grad_input(product_RF, gate_RF, grad_input=grad_gate_RF)
    return grad_hidden_RF
