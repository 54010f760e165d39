"""The arithmetic of the fast path: dispatch, experts and combine as one step, forward and backward.

A single step saves little for the backward pass: the layer's input (not a copy per assignment), the hidden units before
the activation, and on a CPU, where it takes time to compute them again, silu or gelu of them. With A_r the activation
of a row, g the gradient of the output and dA'_r = g_t(r) W_out^T, the gradient of a weight is ⟨A_r, dA'_r⟩, so the
experts' outputs are not needed again. Weights multiply what is cheapest: in Triton A_r and dA'_r, while they are
in registers; else the vectors of width D.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moebench.experts.activation import GATED
from moebench.experts.dispatch import DispatchPlan
from moebench.experts.elementwise import activation_kernels, gpu_activation_kernels, row_kernels
from moebench.experts.grouped import product, weight_gradient
from moebench.experts.kernels import activation
from moebench.routing.kernels.backend import uses_triton
from moebench.routing.values import Routing

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]
"""Gradients of x_TD, weight_N, w_in_EDF and w_out_EFD."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FusedExperts:
    """y_t = Σ_n w_n · act(x_t W_in) W_out over the assignments n of token t, and its gradients."""

    plan: DispatchPlan
    gated: bool
    keeps_activation: bool
    """Whether the expensive part of the activation is kept for the backward pass."""

    @classmethod
    def of(
        cls, x_TD: Tensor, routing: Routing, name: str, *, recompute: bool, order_N: Tensor | None = None
    ) -> "FusedExperts":
        """Plan a routing; `name`: the activation's; `order_N` as in `DispatchPlan.of`."""
        plan = DispatchPlan.of(routing, pad_for=x_TD.dtype, order_N=order_N)
        keeps = not recompute and torch.is_grad_enabled() and x_TD.device.type == "cpu" and not uses_triton(x_TD)
        return cls(plan=plan, gated=GATED[name], keeps_activation=keeps)

    def forward(
        self, x_TD: Tensor, weight_N: Tensor, w_in_EDF: Tensor, w_out_EFD: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return y_TD, the hidden units before the activation, and what else is kept."""
        groups = self.plan.groups
        hidden_RF = product(groups, row_kernels(x_TD).gather(x_TD, self.plan.token_R), w_in_EDF)
        kept_RF: Tensor | None = None
        if self.keeps_activation:
            active_RF, kept_RF = activation.activate_in_parts(hidden_RF, gated=self.gated, keep=True)
        else:
            active_RF = activation_kernels(hidden_RF).activate(hidden_RF, gated=self.gated)
        return self.plan.token_rows.sum(product(groups, active_RF, w_out_EFD), weight_N), hidden_RF, kept_RF

    def backward(self, grad_TD: Tensor, arguments: tuple[Tensor, ...], kept: tuple[Tensor | None, ...]) -> Gradients:
        """Return the gradients of the arguments of `forward`; `kept`: what it returned besides y_TD."""
        hidden_RF, kept_RF = kept
        assert hidden_RF is not None
        if uses_triton(hidden_RF):
            return self._backward_in_triton(grad_TD, arguments, hidden_RF)
        x_TD, weight_N, w_in_EDF, w_out_EFD = arguments
        groups, token_R, weight_R = self.plan.groups, self.plan.token_R, self.plan.weight_R(weight_N)
        rows = row_kernels(x_TD)
        grad_RD = rows.gather(grad_TD, token_R)
        grad_hidden_RF, active_RF, inner_R = activation.backward_with_inner(
            product(groups, grad_RD, w_out_EFD.transpose(1, 2)),
            hidden_RF,
            kept_RF,
            weight_N.dtype,
            gated=self.gated,
        )
        grad_w_out_EFD = weight_gradient(groups, active_RF, grad_RD.mul_(weight_R.unsqueeze(-1)))
        del grad_RD, active_RF
        weighted_RD = rows.sum_groups(x_TD, token_R.unsqueeze(-1), None, weight_R.unsqueeze(-1))
        grad_w_in_EDF = weight_gradient(groups, weighted_RD, grad_hidden_RF)
        grad_x_RD = product(groups, grad_hidden_RF, w_in_EDF.transpose(1, 2))
        grad_x_TD = self.plan.token_rows.sum(grad_x_RD, weight_N)
        return grad_x_TD, self.plan.to_assignments(inner_R), grad_w_in_EDF, grad_w_out_EFD

    def _backward_in_triton(self, grad_TD: Tensor, arguments: tuple[Tensor, ...], hidden_RF: Tensor) -> Gradients:
        x_TD, weight_N, w_in_EDF, w_out_EFD = arguments
        groups, token_R, gather = self.plan.groups, self.plan.token_R, row_kernels(x_TD).gather
        grad_RD = gather(grad_TD, token_R)
        grad_active_RF = product(groups, grad_RD, w_out_EFD.transpose(1, 2))
        grad_hidden_RF, weighted_RF, inner_R = gpu_activation_kernels().weighted_backward(
            grad_active_RF, hidden_RF, self.plan.weight_R(weight_N), gated=self.gated
        )
        grad_w_out_EFD = weight_gradient(groups, weighted_RF, grad_RD)
        del grad_RD, grad_active_RF, weighted_RF
        grad_w_in_EDF = weight_gradient(groups, gather(x_TD, token_R), grad_hidden_RF)
        grad_x_TD = self.plan.token_rows.sum(product(groups, grad_hidden_RF, w_in_EDF.transpose(1, 2)))
        return grad_x_TD, self.plan.to_assignments(inner_R), grad_w_in_EDF, grad_w_out_EFD
