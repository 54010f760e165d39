"""Dispatch and combine: token vectors to rows sorted by expert, and rows back to weighted sums per token.

For the token-major rectangle of dropless token choice both directions are gathers, forward and backward: no
scatter, so the result is deterministic on every device. Other lists are summed by index_add.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moebench.routing.values import Routing


@dataclass(frozen=True, kw_only=True, eq=False)
class DispatchPlan:
    """Which assignment each row computes; rows are sorted by expert, within an expert by assignment."""

    assignment_R: Tensor
    """Row -> assignment (a permutation of 0 ... N-1)."""
    row_N: Tensor
    """Assignment -> row."""
    token_R: Tensor
    """Row -> token."""
    load_E: Tensor
    """Rows per expert."""

    @classmethod
    def of(cls, routing: Routing) -> "DispatchPlan":
        """Sort the assignments by expert."""
        assignment_R = routing.expert_N.argsort(stable=True)
        row_N = torch.empty_like(assignment_R)
        row_N[assignment_R] = torch.arange(assignment_R.numel(), device=assignment_R.device)
        return cls(assignment_R=assignment_R, row_N=row_N, token_R=routing.token_N[assignment_R], load_E=routing.load_E)


def dispatch(x_TD: Tensor, routing: Routing, plan: DispatchPlan) -> Tensor:
    """Return x_RD: each token's vector once per assignment, sorted by expert."""
    if routing.top_k is None:
        return x_TD.index_select(0, plan.token_R)
    rows_RD: Tensor = _Spread.apply(x_TD, plan.token_R, plan.row_N, routing.top_k)  # type: ignore[no-untyped-call]
    return rows_RD


def combine(y_RD: Tensor, routing: Routing, plan: DispatchPlan) -> Tensor:
    """Return y_TD: for each token the sum of its experts' outputs times their weights (0 for an unserved token)."""
    width = y_RD.shape[-1]
    if routing.top_k is None:
        weighted_RD = y_RD * routing.weight_N[plan.assignment_R].unsqueeze(-1).to(y_RD.dtype)
        zeros_TD = y_RD.new_zeros(routing.num_tokens, width)
        return zeros_TD.index_add(0, plan.token_R, weighted_RD)
    y_ND: Tensor = _Permute.apply(y_RD, plan.row_N, plan.assignment_R)  # type: ignore[no-untyped-call]
    weight_TK = routing.weight_N.view(-1, routing.top_k).to(y_RD.dtype)
    if routing.top_k == 1:
        return y_ND * weight_TK
    return torch.bmm(weight_TK.unsqueeze(1), y_ND.view(-1, routing.top_k, width)).squeeze(1)


class _Permute(torch.autograd.Function):
    """Rows in another order; the backward gathers by the inverse permutation."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


class _Spread(torch.autograd.Function):
    """Each token's vector to its K rows; the backward gathers the K rows of each token and adds them."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_R: Tensor, row_N: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(row_N)
        ctx.top_k = top_k
        return x_TD.index_select(0, token_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None, None]:
        (row_N,) = ctx.saved_tensors
        grad_ND = grad_RD.index_select(0, row_N)
        if ctx.top_k == 1:
            return grad_ND, None, None, None
        return grad_ND.view(-1, ctx.top_k, grad_ND.shape[-1]).sum(1), None, None, None
