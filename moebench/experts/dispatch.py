"""Dispatch and combine: token vectors to rows sorted by expert, and rows back to weighted sums per token.

Everything is a gather, forward and backward: a token's rows are indexed and summed in a fixed order, never scattered,
so the result is the same in every run on every device. Weights are at least fp32, in every precision of the rows.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from moebench.experts.elementwise import row_kernels
from moebench.experts.grouped import group_rows
from moebench.experts.kernels.groups import Groups
from moebench.routing.kernels.backend import uses_triton
from moebench.routing.sorting import SortedKeys, sort_keys
from moebench.routing.values import Routing


@dataclass(frozen=True, kw_only=True, eq=False)
class DispatchPlan:
    """Which assignment each row computes; rows are sorted by expert, within an expert by assignment.

    Where loads are nearly equal, every expert may be padded to the same number of rows. On a GPU every assignment has a
    row, so that nothing waits for a count: rows of assignments that are not kept come after the last expert's. On a CPU
    those assignments have no row.
    """

    order_N: Tensor
    """The assignments sorted by expert, those that are not kept last."""
    assignment_R: Tensor
    """Row -> assignment; N for a padding row."""
    token_R: Tensor
    """Row -> token; 0 for a padding row."""
    row_N: Tensor
    """Assignment -> row; any row where it is not kept."""
    kept_N: Tensor | None
    """bool: which assignments have a row; None: all."""
    groups: Groups
    """The rows of each expert."""
    token_rows: "TokenRows"
    """The rows of each token."""

    @classmethod
    def of(
        cls, routing: Routing, *, pad_for: torch.dtype | None = None, order_N: Tensor | None = None
    ) -> "DispatchPlan":
        """Sort the assignments by expert; `order_N`: that of an earlier plan of the same routing.

        `pad_for` as in `group_rows`.
        """
        by_expert = routing.sort_by_expert() if order_N is None else SortedKeys(index_N=order_N)
        groups = group_rows(routing.load_E, pad_for=pad_for)
        row_N, assignment_R = _assign_rows(routing, by_expert, groups)
        token_N = routing.token_N if groups.capacity is None else functional.pad(routing.token_N, (0, 1))
        return cls(
            order_N=by_expert.index_N,
            assignment_R=assignment_R,
            token_R=token_N.index_select(0, assignment_R),
            row_N=row_N,
            kept_N=routing.kept_N,
            groups=groups,
            token_rows=TokenRows.of(routing, row_N, groups),
        )

    def weight_R(self, weight_N: Tensor) -> Tensor:
        """Return the weight of each row, 0 for a padding row."""
        return functional.pad(weight_N, (0, 1)).index_select(0, self.assignment_R)

    def to_assignments(self, value_R: Tensor) -> Tensor:
        """Return the value of each assignment's row, 0 for assignments without one."""
        if value_R.numel() == 0:
            return value_R.new_zeros(self.row_N.shape)
        value_N = value_R.index_select(0, self.row_N)
        return value_N if self.kept_N is None else value_N.where(self.kept_N, 0)


def _assign_rows(routing: Routing, by_expert: SortedKeys, groups: Groups) -> tuple[Tensor, Tensor]:
    """Return row_N and assignment_R."""
    expert_N, order_S = routing.expert_N, by_expert.index_N
    if groups.loads is None and by_expert.place_N is not None:
        return by_expert.place_N, order_S
    if groups.loads is not None:
        order_S = order_S[: sum(groups.loads)]
    row_S = torch.arange(order_S.numel(), device=order_S.device)
    assignment_R = order_S
    if groups.capacity is not None:
        num_experts = len(groups.load_E)
        start_E = torch.arange(0, num_experts * groups.capacity, groups.capacity, device=order_S.device)
        shift_E = start_E - groups.offset_E + groups.load_E
        row_S = row_S + shift_E.index_select(0, expert_N.index_select(0, order_S))
        assignment_R = expert_N.new_full((num_experts * groups.capacity,), expert_N.numel())
        assignment_R.scatter_(0, row_S, order_S)
    row_N = torch.zeros_like(expert_N).scatter_(0, order_S, row_S)
    return row_N, assignment_R


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenRows:
    """The rows of each token, as indices of a gather that sums (an embedding bag)."""

    row_M: Tensor
    """[T, K] for a rectangle; otherwise one list, token after token, on a GPU followed by what is not kept."""
    start_T: Tensor | None = None
    """Start of each token's rows in the list, and as a last element the start of what is not kept."""
    order_N: Tensor | None = None
    """The assignments in the order of `row_M`."""

    @classmethod
    def of(cls, routing: Routing, row_N: Tensor, groups: Groups) -> "TokenRows":
        """Group the rows by token."""
        if routing.top_k is not None and routing.kept_N is None:
            return cls(row_M=row_N.view(routing.num_tokens, routing.top_k))
        order_N = _sort_by_token(routing)
        if groups.loads is not None:  # else what is not kept is the longest sum of all, and nothing reads it
            order_N = order_N[: sum(groups.loads)]
        start_T = functional.pad(routing.experts_per_token_T.cumsum(0), (1, 0))
        return cls(row_M=row_N[order_N], start_T=start_T, order_N=order_N)

    def sum(self, value_RD: Tensor, weight_N: Tensor | None = None) -> Tensor:
        """Return the sum of each token's rows, [T, D], each times its weight if weights are given."""
        if weight_N is not None:
            weight_N = weight_N.view_as(self.row_M) if self.order_N is None else weight_N[self.order_N]
        return row_kernels(value_RD).sum_groups(value_RD, self.row_M, self.start_T, weight_N)


def _sort_by_token(routing: Routing) -> Tensor:
    """Return the assignments sorted by token, those that are not kept last."""
    key_N, num_keys = routing.token_N, routing.num_tokens
    if routing.top_k is not None and uses_triton(routing.weight_N):
        key_N, num_keys = torch.zeros_like(key_N), 1  # sorted already: what is not kept moves to the end
    return sort_keys(key_N, routing.kept_N, num_keys, like=routing.weight_N).index_N


def dispatch(x_TD: Tensor, plan: DispatchPlan) -> Tensor:
    """Return x_RD: each token's vector once per assignment, sorted by expert."""
    rows_RD: Tensor = _Dispatch.apply(x_TD, plan)  # type: ignore[no-untyped-call]
    return rows_RD


def combine(y_RD: Tensor, weight_N: Tensor, plan: DispatchPlan) -> Tensor:
    """Return y_TD: for each token the sum of its experts' outputs times their weights (0 for an unserved token)."""
    y_TD: Tensor = _Combine.apply(y_RD, cast_row_weights(weight_N, y_RD), plan)  # type: ignore[no-untyped-call]
    return y_TD


def cast_row_weights(weight_N: Tensor, rows: Tensor) -> Tensor:
    """Return weights of rows in fp32, or in fp64 if the rows are."""
    return weight_N.to(torch.promote_types(rows.dtype, torch.float32))


class _Dispatch(torch.autograd.Function):
    """Copy each token's vector to its rows; the backward pass sums the rows of each token."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, plan: DispatchPlan) -> Tensor:
        ctx.plan = plan
        return row_kernels(x_TD).gather(x_TD, plan.token_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        return ctx.plan.token_rows.sum(grad_RD), None


class _Combine(torch.autograd.Function):
    """Sum the weighted rows of each token; the backward pass gives a row its token's gradient times its weight."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, weight_N: Tensor, plan: DispatchPlan) -> Tensor:
        ctx.save_for_backward(y_RD, weight_N)
        ctx.plan = plan
        return plan.token_rows.sum(y_RD, weight_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        y_RD, weight_N = ctx.saved_tensors
        plan: DispatchPlan = ctx.plan
        weight_R = plan.weight_R(weight_N)
        grad_RD, inner_R = row_kernels(y_RD).weigh_gathered(grad_TD, y_RD, plan.token_R, weight_R)
        return grad_RD, plan.to_assignments(inner_R), None
