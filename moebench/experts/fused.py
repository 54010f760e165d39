"""The fast path of a bank of equal feed-forward experts: dispatch, experts and combine as one differentiable step.

A single step saves little for the backward pass: the layer's input (not a copy per assignment), the hidden
pre-activations, the experts' outputs and, unless it is recomputed, the activation.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moebench.experts.activation import activation_backward, apply_nonlinearity, multiply_by_value
from moebench.experts.dispatch import DispatchPlan, combine_backward
from moebench.experts.grouped import cast_for_autocast, product, weight_gradient
from moebench.routing.values import Routing


@dataclass(frozen=True, kw_only=True, eq=False)
class _Step:
    """Everything but tensors that the forward and backward pass need."""

    plan: DispatchPlan
    activation: str
    recompute: bool


def fused_mixture(
    x_TD: Tensor, routing: Routing, w_in_EDF: Tensor, w_out_EFD: Tensor, activation: str, *, recompute: bool
) -> Tensor:
    """Return Σ_e w_te E_e(x_t) for every token; with `recompute` the activation is computed again, not saved."""
    # What is traced around it stays compiled; the choice of kernels depends on the loads. `torch.compiler.disable`
    # as a decorator would import dynamo, as long as torch itself, in processes that never compute.
    compute = torch.compiler.disable(_fused_mixture) if torch.compiler.is_compiling() else _fused_mixture  # type: ignore[no-untyped-call]
    y_TD: Tensor = compute(x_TD, routing, w_in_EDF, w_out_EFD, activation, recompute=recompute)
    return y_TD


def _fused_mixture(
    x_TD: Tensor, routing: Routing, w_in_EDF: Tensor, w_out_EFD: Tensor, activation: str, *, recompute: bool
) -> Tensor:
    x_TD, w_in_EDF, w_out_EFD = cast_for_autocast(x_TD, w_in_EDF, w_out_EFD)
    plan = DispatchPlan.of(routing, may_pad=x_TD.element_size() <= 4)
    step = _Step(plan=plan, activation=activation, recompute=recompute)
    weight_N = routing.weight_N.to(x_TD.dtype)
    y_TD: Tensor = _FusedMixture.apply(x_TD, weight_N, w_in_EDF, w_out_EFD, step)  # type: ignore[no-untyped-call]
    return y_TD


class _FusedMixture(torch.autograd.Function):
    """y_t = Σ_n w_n · act(x_t W_in) W_out over the assignments n of token t."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_N: Tensor, w_in_EDF: Tensor, w_out_EFD: Tensor, step: _Step) -> Tensor:
        plan, activation = step.plan, step.activation
        hidden_RF = product(plan.groups, x_TD.index_select(0, plan.token_R), w_in_EDF)
        nonlinear_RF = apply_nonlinearity(hidden_RF, activation)
        y_RD = product(plan.groups, multiply_by_value(nonlinear_RF, hidden_RF, activation), w_out_EFD)
        saved_RF = None if step.recompute else nonlinear_RF
        ctx.save_for_backward(x_TD, weight_N, w_in_EDF, w_out_EFD, hidden_RF, saved_RF, y_RD)
        ctx.step = step
        return plan.token_rows.sum(y_RD, weight_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_N, w_in_EDF, w_out_EFD, hidden_RF, nonlinear_RF, y_RD = ctx.saved_tensors
        plan, activation = ctx.step.plan, ctx.step.activation
        grad_RD, grad_weight_N = combine_backward(grad_TD.contiguous(), y_RD, weight_N, plan)
        if nonlinear_RF is None:
            nonlinear_RF = apply_nonlinearity(hidden_RF, activation)
        active_RF = multiply_by_value(nonlinear_RF, hidden_RF, activation)
        grad_w_out_EFD = weight_gradient(plan.groups, active_RF, grad_RD)
        grad_active_RF = product(plan.groups, grad_RD, w_out_EFD.transpose(1, 2))
        grad_hidden_RF = activation_backward(grad_active_RF, nonlinear_RF, hidden_RF, activation)
        grad_w_in_EDF = weight_gradient(plan.groups, x_TD.index_select(0, plan.token_R), grad_hidden_RF)
        grad_x_RD = product(plan.groups, grad_hidden_RF, w_in_EDF.transpose(1, 2))
        return plan.token_rows.sum(grad_x_RD), grad_weight_N, grad_w_in_EDF, grad_w_out_EFD, None
