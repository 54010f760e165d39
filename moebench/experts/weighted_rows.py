"""Rows that came from other processes, through a bank of equal feed-forward experts, each times its weight.

The counterpart of `fused_experts` where experts are sharded: an expert's process gets the weight of a row with it, so
the gradient of the weight is ⟨A_r, dA'_r⟩ there, and no process keeps the experts' outputs for the backward pass. Of
the activation it keeps on a CPU what takes time to compute again, elsewhere nothing.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moebench.experts.activation import GATED
from moebench.experts.dispatch import DispatchPlan
from moebench.experts.elementwise import activation_kernels, gpu_activation_kernels, row_kernels
from moebench.experts.grouped import group_rows, product, weight_gradient
from moebench.experts.kernels import activation
from moebench.experts.kernels.groups import Groups
from moebench.routing.kernels.backend import uses_triton


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightedExperts:
    """y_r = w_r · act(x_r W_in) W_out for rows sorted by expert."""

    w_in_EDF: Tensor
    w_out_EFD: Tensor
    activation: str

    def __call__(self, x_RD: Tensor, weight_R: Tensor, load_E: Tensor) -> Tensor:
        """Return y_RD; weights are fp32, or fp64 where the rows are."""
        gated, groups = GATED[self.activation], group_rows(load_E)
        y_RD: Tensor = _WeightedRows.apply(x_RD, weight_R, self.w_in_EDF, self.w_out_EFD, (groups, gated))  # type: ignore[no-untyped-call]
        return y_RD


class _WeightedRows(torch.autograd.Function):
    """The experts on rows; saves the rows, the hidden units before the activation; on a CPU silu or gelu of them."""

    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, weight_R: Tensor, w_in_EDF: Tensor, w_out_EFD: Tensor, plan: tuple[Groups, bool]
    ) -> Tensor:
        groups, gated = plan
        hidden_RF, kept_RF = product(groups, x_RD, w_in_EDF), None
        if x_RD.device.type == "cpu" and not uses_triton(x_RD):
            active_RF, kept_RF = activation.activate_in_parts(hidden_RF, gated=gated, keep=True)
        else:
            active_RF = activation_kernels(hidden_RF).activate(hidden_RF, gated=gated)
        ctx.save_for_backward(x_RD, weight_R, w_in_EDF, w_out_EFD, hidden_RF, kept_RF)
        ctx.groups, ctx.gated = groups, gated
        return product(groups, active_RF, w_out_EFD).mul_(weight_R.unsqueeze(-1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, weight_R, w_in_EDF, w_out_EFD, hidden_RF, kept_RF = ctx.saved_tensors
        groups, grad_RD = ctx.groups, grad_RD.contiguous()
        grad_active_RF = product(groups, grad_RD, w_out_EFD.transpose(1, 2))
        if uses_triton(hidden_RF):
            grad_hidden_RF, weighted_RF, inner_R = gpu_activation_kernels().weighted_backward(
                grad_active_RF, hidden_RF, weight_R, gated=ctx.gated
            )
            grad_w_out_EFD = weight_gradient(groups, weighted_RF, grad_RD)
            grad_w_in_EDF = weight_gradient(groups, x_RD, grad_hidden_RF)
            grad_x_RD = product(groups, grad_hidden_RF, w_in_EDF.transpose(1, 2))
            return grad_x_RD, inner_R, grad_w_in_EDF, grad_w_out_EFD, None
        grad_hidden_RF, active_RF, inner_R = activation.backward_with_inner(
            grad_active_RF, hidden_RF, kept_RF, weight_R.dtype, gated=ctx.gated
        )
        weight_R1 = weight_R.to(x_RD.dtype).unsqueeze(-1)
        grad_w_out_EFD = weight_gradient(groups, active_RF, grad_RD * weight_R1)
        grad_w_in_EDF = weight_gradient(groups, x_RD * weight_R1, grad_hidden_RF)
        grad_x_RD = product(groups, grad_hidden_RF, w_in_EDF.transpose(1, 2)).mul_(weight_R1)
        return grad_x_RD, inner_R, grad_w_in_EDF, grad_w_out_EFD, None


def sum_rows(y_RD: Tensor, plan: DispatchPlan) -> Tensor:
    """Return y_TD: for each token the sum of its rows, which keeps nothing for the backward pass."""
    y_TD: Tensor = _SumRows.apply(y_RD, plan)  # type: ignore[no-untyped-call]
    return y_TD


class _SumRows(torch.autograd.Function):
    """Sum the rows of each token; the backward pass gives a row its token's gradient."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, plan: DispatchPlan) -> Tensor:
        ctx.plan = plan
        return plan.token_rows.sum(y_RD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        return row_kernels(grad_TD).gather(grad_TD.contiguous(), ctx.plan.token_R), None
