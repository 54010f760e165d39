"""Activations of hidden units by torch's operators: silu of the first half times the second half (gated), or gelu.

On a CPU they go through the rows in blocks that stay in the cache, so that the operators do not each read and write
main memory.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 2**17
"""Elements of a block for each thread: smaller ones fit into more caches, but the calls cost more than they save."""
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
    active_RF = hidden_RF.new_empty(hidden_RF.shape[0], hidden_RF.shape[1] // 2)
    silu_RF = torch.empty_like(active_RF) if keep else active_RF
    for hidden, active, silu in _split(hidden_RF, active_RF, silu_RF):
        gate, value = hidden.chunk(2, dim=-1)
        torch.mul(aten.silu.out(gate, out=silu), value, out=active)
    return active_RF, silu_RF


def activate_backward(grad_RF: Tensor, hidden_RF: Tensor, *, gated: bool) -> Tensor:
    """Return the gradient of the hidden units."""
    grad_hidden_RF = torch.empty_like(hidden_RF)
    for grad, hidden, grad_hidden in _split(grad_RF, hidden_RF, grad_hidden_RF):
        if gated:
            gate, value = hidden.chunk(2, dim=-1)
            grad_gate, grad_value = grad_hidden.chunk(2, dim=-1)
            torch.mul(aten.silu.default(gate), grad, out=grad_value)
            aten.silu_backward.grad_input(grad * value, gate, grad_input=grad_gate)
        else:
            aten.gelu_backward.grad_input(grad, hidden, grad_input=grad_hidden)
    return grad_hidden_RF


def backward_with_inner(
    grad_RF: Tensor, hidden_RF: Tensor, expensive_RF: Tensor | None, inner_dtype: torch.dtype, *, gated: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of the hidden units, the activation, and the inner product of activation and gradient.

    `expensive_RF`: what `activate_in_parts` kept; None: it is computed again. `grad_RF` is overwritten.
    """
    inner_R = grad_RF.new_empty(grad_RF.shape[0], dtype=inner_dtype)
    if not gated:
        active_RF: Tensor = aten.gelu.default(hidden_RF) if expensive_RF is None else expensive_RF
        for grad, hidden, active, inner in _split(grad_RF, hidden_RF, active_RF, inner_R):
            torch.sum(active * grad, -1, dtype=inner_dtype, out=inner)
            aten.gelu_backward.grad_input(grad, hidden, grad_input=grad)
        return grad_RF, active_RF, inner_R
    grad_hidden_RF, active_RF = torch.empty_like(hidden_RF), torch.empty_like(grad_RF)
    silu_RF = active_RF if expensive_RF is None else expensive_RF
    for grad, hidden, silu, active, inner, grad_hidden in _split(
        grad_RF, hidden_RF, silu_RF, active_RF, inner_R, grad_hidden_RF
    ):
        gate, value = hidden.chunk(2, dim=-1)
        grad_gate, grad_value = grad_hidden.chunk(2, dim=-1)
        if expensive_RF is None:
            aten.silu.out(gate, out=silu)
        torch.mul(silu, grad, out=grad_value)
        torch.mul(silu, value, out=active)
        torch.sum(grad_value * value, -1, dtype=inner_dtype, out=inner)
        aten.silu_backward.grad_input(grad.mul_(value), gate, grad_input=grad_gate)
    return grad_hidden_RF, active_RF, inner_R


def _split(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the tensors' rows in blocks: all of them at once where they are not on a CPU."""
    longest = max(tensors, key=Tensor.numel)
    elements = BLOCK * torch.get_num_threads()
    if longest.device.type != "cpu" or longest.numel() <= elements:
        return iter([tensors])
    num_rows = max(elements * len(longest) // longest.numel(), 1)
    return zip(*(torch.split(tensor, num_rows) for tensor in tensors), strict=True)
