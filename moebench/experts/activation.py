"""Hidden units of feed-forward networks: activations and dropout."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from moebench.experts.elementwise import activation_kernels

GATED = {"gelu": False, "swiglu": True}
"""Activations by name; a gated one has a second input projection that multiplies the first."""


def activate(hidden_RF: Tensor, activation: str) -> Tensor:
    """Apply the activation; a gated one halves the last dimension: silu(first half) · second half."""
    if not GATED[activation]:
        return functional.gelu(hidden_RF)  # one pass, and nothing saved but its argument
    if torch.compiler.is_compiling():  # the compiler makes one pass of it
        gate_RF, value_RF = hidden_RF.chunk(2, dim=-1)
        return functional.silu(gate_RF) * value_RF
    active_RF: Tensor = _SwiGLU.apply(hidden_RF)  # type: ignore[no-untyped-call]
    return active_RF


class _SwiGLU(torch.autograd.Function):
    """silu(first half) · second half; the backward pass computes the silu again instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, hidden_XF: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_XF)
        hidden_RF = _as_rows(hidden_XF)
        active_RF = activation_kernels(hidden_RF).activate(hidden_RF, gated=True)
        return active_RF.view(*hidden_XF.shape[:-1], active_RF.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_XF: Tensor) -> Tensor:
        (hidden_XF,) = ctx.saved_tensors
        grad_RF, hidden_RF = _as_rows(grad_XF), _as_rows(hidden_XF)
        grad_hidden_RF = activation_kernels(hidden_RF).activate_backward(grad_RF, hidden_RF, gated=True)
        return grad_hidden_RF.view_as(hidden_XF)


def _as_rows(value_XF: Tensor) -> Tensor:
    return value_XF.unsqueeze(0).flatten(0, -2)


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
