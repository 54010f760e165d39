"""The fast path of a bank of equal feed-forward experts, differentiable and compilable."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moebench.experts.dispatch import cast_row_weights
from moebench.experts.fused_experts import FusedExperts
from moebench.experts.fused_operator import apply_operator
from moebench.experts.grouped import cast_for_autocast
from moebench.routing.values import Routing


def compute_fused_mixture(
    x_TD: Tensor, routing: Routing, w_in_EDF: Tensor, w_out_EFD: Tensor, activation: str, *, recompute: bool
) -> Tensor:
    """Return Σ_e w_te E_e(x_t) for every token; with `recompute` the activation is computed again on a CPU too."""
    x_TD, w_in_EDF, w_out_EFD = cast_for_autocast(x_TD, w_in_EDF, w_out_EFD)
    tensors = x_TD, cast_row_weights(routing.weight_N, x_TD), w_in_EDF, w_out_EFD
    if torch.compiler.is_compiling():  # else without the operator: its dispatcher takes as long as a small layer
        return apply_operator(tensors, routing, activation)
    experts = FusedExperts.of(x_TD, routing, activation, recompute=recompute)
    y_TD: Tensor = _FusedMixture.apply(*tensors, experts)  # type: ignore[no-untyped-call]
    return y_TD


class _FusedMixture(torch.autograd.Function):
    """`FusedExperts` as one step of autograd."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_N: Tensor, w_in_EDF: Tensor, w_out_EFD: Tensor, experts: FusedExperts
    ) -> Tensor:
        y_TD, *kept = experts.forward(x_TD, weight_N, w_in_EDF, w_out_EFD)
        ctx.save_for_backward(x_TD, weight_N, w_in_EDF, w_out_EFD, *kept)
        ctx.experts = experts
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        return (*ctx.experts.backward(grad_TD.contiguous(), saved[:4], saved[4:]), None)
