"""Activations of hidden units by torch's operators: silu of the first half times the second half (gated), or gelu.

On a CPU they go through the rows in blocks that stay in the cache, so that the operators do not each read and write
main memory. Nothing is kept from the forward pass but the hidden units; the backward pass computes the rest again.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 2**17
"""Elements of a block for each thread: smaller ones fit into more caches, but the calls cost more than they save."""
aten = torch.ops.aten


def activate(hidden_RF: Tensor, *, gated: bool) -> Tensor:
    """Return gelu of the hidden units, or silu of their first half times the second half."""
    if not gated:
        active: Tensor = aten.gelu.default(hidden_RF)
        return active
    active_RF = hidden_RF.new_empty(hidden_RF.shape[0], hidden_RF.shape[1] // 2)
    for hidden, active in _split(hidden_RF, active_RF):
        gate, value = hidden.chunk(2, dim=-1)
        aten.silu.out(gate, out=active).mul_(value)
    return active_RF


def activate_backward(grad_RF: Tensor, hidden_RF: Tensor, *, gated: bool) -> Tensor:
    """Return the gradient of the hidden units."""
    grad_hidden_RF = torch.empty_like(hidden_RF)
    for grad, hidden, grad_hidden in _split(grad_RF, hidden_RF, grad_hidden_RF):
        if gated:
            _swiglu_backward(grad, hidden, grad_hidden)
        else:
            aten.gelu_backward.grad_input(grad, hidden, grad_input=grad_hidden)
    return grad_hidden_RF


def weighted_backward(
    grad_RF: Tensor, hidden_RF: Tensor, weight_R: Tensor, *, gated: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate w_r act(h_r): return the gradient of h, w act(h) itself, and the gradient of w.

    `grad_RF` is overwritten by one of the results, so that no further buffer is needed.
    """
    grad_weight_R = torch.empty_like(weight_R)
    other_RF = torch.empty_like(hidden_RF)
    for grad, hidden, weight, other, grad_weight in _split(grad_RF, hidden_RF, weight_R, other_RF, grad_weight_R):
        active = activate(hidden, gated=gated)
        # In the precision of the weights, which is at least fp32.
        grad_weight.copy_(torch.linalg.vecdot(active.to(weight.dtype), grad.to(weight.dtype)))
        grad.mul_(weight.unsqueeze(-1))
        if gated:
            _swiglu_backward(grad, hidden, other)
            torch.mul(active, weight.unsqueeze(-1), out=grad)
        else:
            torch.mul(active, weight.unsqueeze(-1), out=other)
            aten.gelu_backward.grad_input(grad, hidden, grad_input=grad)
    return (other_RF, grad_RF, grad_weight_R) if gated else (grad_RF, other_RF, grad_weight_R)


def _swiglu_backward(grad: Tensor, hidden: Tensor, grad_hidden: Tensor) -> None:
    gate, value = hidden.chunk(2, dim=-1)
    grad_gate, grad_value = grad_hidden.chunk(2, dim=-1)
    torch.mul(aten.silu.default(gate), grad, out=grad_value)
    aten.silu_backward.grad_input(grad * value, gate, grad_input=grad_gate)


def _split(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the tensors' rows in blocks: all of them at once where they are not on a CPU."""
    longest = max(tensors, key=Tensor.numel)
    elements = BLOCK * torch.get_num_threads()
    if longest.device.type != "cpu" or longest.numel() <= elements:
        return iter([tensors])
    num_rows = max(elements * len(longest) // longest.numel(), 1)
    return zip(*(torch.split(tensor, num_rows) for tensor in tensors), strict=True)
