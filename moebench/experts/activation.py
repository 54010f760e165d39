"""Hidden units of feed-forward networks: activations, their backward pass for the fused path, and dropout."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional

GATED = {"gelu": False, "swiglu": True}
"""Activations by name; a gated one has a second input projection that multiplies the first."""


def activate(hidden_RF: Tensor, activation: str) -> Tensor:
    """Apply the activation; a gated one halves the last dimension: silu(first half) · second half."""
    return multiply_by_value(apply_nonlinearity(hidden_RF, activation), hidden_RF, activation)


def apply_nonlinearity(hidden_RF: Tensor, activation: str) -> Tensor:
    """Return the expensive part of `activate`: gelu of everything, or silu of the first half."""
    return functional.silu(hidden_RF.chunk(2, dim=-1)[0]) if GATED[activation] else functional.gelu(hidden_RF)


def multiply_by_value(nonlinear_RF: Tensor, hidden_RF: Tensor, activation: str) -> Tensor:
    """Return the cheap part of `activate`: the product with the second half, where the activation is gated."""
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


@dataclass(frozen=True, kw_only=True, eq=False)
class Dropout:
    """Inverted dropout of hidden units in training (Switch's expert dropout, arXiv:2101.03961, section 2.4)."""

    rate: float
    """Probability that a unit becomes 0; the others are divided by 1 - rate."""
    generator: Generator
    """Generator of the step and the layer: a recomputed forward pass makes it again and draws the same."""

    def __call__(self, hidden_RF: Tensor) -> Tensor:
        """Return the hidden units, each set to 0 with probability `rate` and scaled up otherwise."""
        uniform_RF = torch.rand(hidden_RF.shape, generator=self.generator, device=hidden_RF.device)
        return torch.where(uniform_RF >= self.rate, hidden_RF / (1 - self.rate), 0.0)
