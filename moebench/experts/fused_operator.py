"""The fast path as an operator of torch, so that `torch.compile` takes a whole block as one graph.

What is inside is not traced: kernels are chosen by the loads, which a graph does not know. The number of rows is a
size that only the run knows where loads are known to the host, and the number of assignments on a GPU.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moebench.experts.fused_experts import FusedExperts
from moebench.routing.values import Routing

TENSORS = "Tensor x_TD, Tensor weight_N, Tensor w_in_EDF, Tensor w_out_EFD"
LISTS = "Tensor token_N, Tensor expert_N, Tensor? kept_N, int? top_k, str activation"
SAVED = "Tensor hidden_RF, Tensor order_N"


def apply_operator(tensors: tuple[Tensor, Tensor, Tensor, Tensor], routing: Routing, activation: str) -> Tensor:
    """Return y_TD; `tensors`: x_TD, weight_N, w_in_EDF and w_out_EFD."""
    lists = routing.token_N, routing.expert_N, routing.kept_N, routing.top_k
    y_TD: Tensor = torch.ops.moebench.mixture(*tensors, *lists, activation)[0]
    return y_TD


@torch.library.custom_op(
    "moebench::mixture", mutates_args=(), schema=f"({TENSORS}, {LISTS}) -> (Tensor, Tensor, Tensor)"
)
def mixture(
    x_TD: Tensor, weight_N: Tensor, w_in_EDF: Tensor, w_out_EFD: Tensor, *lists: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y_TD, and for the backward pass the hidden units of each row and the order of the assignments."""
    experts = _plan((x_TD, weight_N, w_in_EDF), lists)
    y_TD, hidden_RF, _ = experts.forward(x_TD, weight_N, w_in_EDF, w_out_EFD)
    return y_TD, hidden_RF.contiguous(), experts.plan.order_N  # as promised below: kernels may return slices


@mixture.register_fake
def _(x_TD: Tensor, weight_N: Tensor, w_in_EDF: Tensor, w_out_EFD: Tensor, *lists: Any) -> tuple[Tensor, ...]:
    on_cpu = x_TD.device.type == "cpu"
    num_rows = torch.library.get_ctx().new_dynamic_size() if on_cpu else weight_N.shape[0]
    return torch.empty_like(x_TD), x_TD.new_empty(num_rows, w_in_EDF.shape[2]), torch.empty_like(lists[1])


@torch.library.custom_op(
    "moebench::mixture_backward",
    mutates_args=(),
    schema=f"(Tensor grad_TD, {TENSORS}, {SAVED}, {LISTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def mixture_backward(grad_TD: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x_TD, the weights of the assignments and the weights of the experts."""
    *tensors, hidden_RF, order_N = arguments[:6]
    experts = _plan(tensors, arguments[6:], order_N)
    gradients = experts.backward(grad_TD.contiguous(), tuple(tensors), (hidden_RF, None))
    x_TD, weight_N, w_in_EDF, w_out_EFD = (gradient.contiguous() for gradient in gradients)
    return x_TD, weight_N, w_in_EDF, w_out_EFD


@mixture_backward.register_fake
def _(grad_TD: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(tensor) for tensor in arguments[:4])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, token_N, expert_N, kept_N, top_k, activation = inputs
    _, hidden_RF, order_N = output
    ctx.mark_non_differentiable(hidden_RF, order_N)
    ctx.save_for_backward(*tensors, hidden_RF, order_N, token_N, expert_N, kept_N)
    ctx.options = top_k, activation


def _backward(ctx: Any, grad_TD: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.moebench.mixture_backward(grad_TD, *ctx.saved_tensors, *ctx.options)
    return (*gradients, None, None, None, None, None)


mixture.register_autograd(_backward, setup_context=_setup)


def _plan(tensors: Sequence[Tensor], lists: Sequence[Any], order_N: Tensor | None = None) -> FusedExperts:
    x_TD, weight_N, w_in_EDF = tensors[:3]
    token_N, expert_N, kept_N, top_k, activation = lists
    routing = Routing(
        token_N=token_N,
        expert_N=expert_N,
        weight_N=weight_N,
        num_tokens=x_TD.shape[0],
        num_experts=w_in_EDF.shape[0],
        kept_N=kept_N,
        top_k=top_k,
    )
    return FusedExperts.of(x_TD, routing, activation, recompute=True, order_N=order_N)
