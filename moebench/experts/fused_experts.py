"""The arithmetic of the fast path: dispatch, experts and combine as one step, forward and backward.

A single step saves little for the backward pass: the layer's input (not a copy per assignment) and the hidden units
before the activation. With A_r the activation of a row, g the gradient of the output and dA'_r = g_t(r) W_out^T, the
gradient of a weight is ⟨A_r, dA'_r⟩, so the experts' outputs are not needed again; and that of W_out is the sum of the
outer products of w_r A_r and g_t(r), so no gradient is scaled on the wide side.
"""

from dataclasses import dataclass

from torch import Tensor

from moebench.experts.activation import GATED
from moebench.experts.dispatch import DispatchPlan
from moebench.experts.elementwise import activation_kernels, row_kernels
from moebench.experts.grouped import product, weight_gradient
from moebench.routing.values import Routing


@dataclass(frozen=True, kw_only=True, eq=False)
class FusedExperts:
    """y_t = Σ_n w_n · act(x_t W_in) W_out over the assignments n of token t, and its gradients."""

    plan: DispatchPlan
    gated: bool

    @classmethod
    def of(cls, x_TD: Tensor, routing: Routing, activation: str, order_N: Tensor | None = None) -> "FusedExperts":
        """Plan a routing; `order_N` as in `DispatchPlan.of`."""
        plan = DispatchPlan.of(routing, may_pad=x_TD.element_size() <= 4, order_N=order_N)
        return cls(plan=plan, gated=GATED[activation])

    def forward(self, x_TD: Tensor, weight_N: Tensor, w_in_EDF: Tensor, w_out_EFD: Tensor) -> tuple[Tensor, Tensor]:
        """Return y_TD and the hidden units before the activation."""
        groups = self.plan.groups
        hidden_RF = product(groups, row_kernels(x_TD).gather(x_TD, self.plan.token_R), w_in_EDF)
        active_RF = activation_kernels(hidden_RF).activate(hidden_RF, gated=self.gated)
        return self.plan.token_rows.sum(product(groups, active_RF, w_out_EFD), weight_N), hidden_RF

    def backward(self, grad_TD: Tensor, saved: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the gradients of the arguments of `forward`; `saved`: those arguments and the hidden units."""
        x_TD, weight_N, w_in_EDF, w_out_EFD, hidden_RF = saved
        groups, token_R, gather = self.plan.groups, self.plan.token_R, row_kernels(x_TD).gather
        grad_RD = gather(grad_TD, token_R)
        grad_hidden_RF, weighted_RF, grad_weight_R = activation_kernels(hidden_RF).weighted_backward(
            product(groups, grad_RD, w_out_EFD.transpose(1, 2)),
            hidden_RF,
            self.plan.weight_R(weight_N),
            gated=self.gated,
        )
        grad_w_out_EFD = weight_gradient(groups, weighted_RF, grad_RD)
        del grad_RD, weighted_RF
        grad_w_in_EDF = weight_gradient(groups, gather(x_TD, token_R), grad_hidden_RF)
        grad_x_TD = self.plan.token_rows.sum(product(groups, grad_hidden_RF, w_in_EDF.transpose(1, 2)))
        return grad_x_TD, self.plan.to_assignments(grad_weight_R), grad_w_in_EDF, grad_w_out_EFD
