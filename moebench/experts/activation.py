"""Activations of feed-forward networks, and their backward pass as the fast path of the experts uses it."""

import torch
from torch import Tensor
from torch.nn import functional

GATED = {"gelu": False, "swiglu": True}
"""Activations by name; a gated one has a second input projection that multiplies the first."""


def activate(hidden_RF: Tensor, activation: str) -> Tensor:
    """Apply the activation; a gated one halves the last dimension: silu(first half) · second half."""
    return product_with_value(nonlinear(hidden_RF, activation), hidden_RF, activation)


def nonlinear(hidden_RF: Tensor, activation: str) -> Tensor:
    """Return the costly half of `activate`: gelu of everything, or silu of the first half."""
    return functional.silu(hidden_RF.chunk(2, dim=-1)[0]) if GATED[activation] else functional.gelu(hidden_RF)


def product_with_value(nonlinear_RF: Tensor, hidden_RF: Tensor, activation: str) -> Tensor:
    """Return the other half of `activate`: the product with the second half, where the activation is gated."""
    return nonlinear_RF * hidden_RF.chunk(2, dim=-1)[1] if GATED[activation] else nonlinear_RF


def activation_backward(grad_RF: Tensor, nonlinear_RF: Tensor, hidden_RF: Tensor, activation: str) -> Tensor:
    """Return the gradient of the pre-activations; overwrites `grad_RF`, so that no further buffer is needed."""
    aten = torch.ops.aten
    if not GATED[activation]:
        aten.gelu_backward.grad_input(grad_RF, hidden_RF, grad_input=grad_RF)
        return grad_RF
    gate_RF, value_RF = hidden_RF.chunk(2, dim=-1)
    grad_hidden_RF = torch.empty_like(hidden_RF)
    grad_gate_RF, grad_value_RF = grad_hidden_RF.chunk(2, dim=-1)
    torch.mul(nonlinear_RF, grad_RF, out=grad_value_RF)
    aten.silu_backward.grad_input(grad_RF.mul_(value_RF), gate_RF, grad_input=grad_gate_RF)
    return grad_hidden_RF
