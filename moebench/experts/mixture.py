"""The fast path of a bank of equal feed-forward experts: dispatch, experts and combine as one differentiable step.

As one step it need not keep what can be had again: saved for the backward pass are the layer's input (not its copy
per assignment), the hidden pre-activations, the experts' outputs and, unless it is recomputed, the activation.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moebench.experts.activation import activation_backward, nonlinear, product_with_value
from moebench.experts.dispatch import DispatchPlan, combine_backward
from moebench.experts.grouped import as_autocast
from moebench.routing.values import Routing


# What is traced around it stays compiled; the choice of kernels depends on the loads.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def mixture(
    x_TD: Tensor, routing: Routing, w_in_EDF: Tensor, w_out_EFD: Tensor, activation: str, *, recompute: bool
) -> Tensor:
    """Return Σ_e w_te E_e(x_t) for every token; with `recompute` the activation is computed again, not saved."""
    x_TD, w_in_EDF, w_out_EFD = as_autocast(x_TD, w_in_EDF, w_out_EFD)
    plan = DispatchPlan.of(routing, may_pad=x_TD.element_size() <= 4)
    weight_N = routing.weight_N.to(x_TD.dtype)
    y_TD: Tensor = _Mixture.apply(x_TD, weight_N, w_in_EDF, w_out_EFD, plan, activation, recompute)  # type: ignore[no-untyped-call]
    return y_TD


class _Mixture(torch.autograd.Function):
    """y_t = Σ_n w_n · act(x_t W_in) W_out over the assignments n of token t."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_N: Tensor,
        w_in_EDF: Tensor,
        w_out_EFD: Tensor,
        plan: DispatchPlan,
        activation: str,
        recompute: bool,
    ) -> Tensor:
        groups = plan.groups
        hidden_RF = groups.product(x_TD.index_select(0, plan.token_R), w_in_EDF)
        nonlinear_RF = nonlinear(hidden_RF, activation)
        y_RD = groups.product(product_with_value(nonlinear_RF, hidden_RF, activation), w_out_EFD)
        kept_RF = None if recompute else nonlinear_RF
        ctx.save_for_backward(x_TD, weight_N, w_in_EDF, w_out_EFD, hidden_RF, kept_RF, y_RD)
        ctx.plan, ctx.activation = plan, activation
        return plan.bags.sum(y_RD, weight_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_N, w_in_EDF, w_out_EFD, hidden_RF, nonlinear_RF, y_RD = ctx.saved_tensors
        plan: DispatchPlan = ctx.plan
        groups, activation = plan.groups, ctx.activation
        grad_RD, grad_weight_N = combine_backward(grad_TD.contiguous(), y_RD, weight_N, plan)
        if nonlinear_RF is None:
            nonlinear_RF = nonlinear(hidden_RF, activation)
        active_RF = product_with_value(nonlinear_RF, hidden_RF, activation)
        grad_w_out_EFD = groups.weight_gradient(active_RF, grad_RD)
        grad_active_RF = groups.product(grad_RD, w_out_EFD.transpose(1, 2))
        grad_hidden_RF = activation_backward(grad_active_RF, nonlinear_RF, hidden_RF, activation)
        grad_w_in_EDF = groups.weight_gradient(x_TD.index_select(0, plan.token_R), grad_hidden_RF)
        grad_x_TD = plan.bags.sum(groups.product(grad_hidden_RF, w_in_EDF.transpose(1, 2)))
        return grad_x_TD, grad_weight_N, grad_w_in_EDF, grad_w_out_EFD, None, None, None
