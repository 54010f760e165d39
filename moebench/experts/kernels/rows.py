"""Gathers of rows, and sums of gathered rows, by torch's operators."""

from torch import Tensor
from torch.nn import functional


def gather(x_TD: Tensor, index_R: Tensor) -> Tensor:
    """Return the rows of x_TD at the indices."""
    return x_TD.index_select(0, index_R)


def sum_groups(value_RD: Tensor, row_M: Tensor, start_T: Tensor | None, weight_M: Tensor | None) -> Tensor:
    """Return the sum of each token's rows, [T, D], each times its weight if weights are given.

    `row_M`: rows of each token, [T, K]; or one list, token after token, and `start_T` the start of each token's rows
    in it, with the end of the last one's as a last element.
    """
    if value_RD.numel() == 0 or row_M.numel() == 0:
        return value_RD.new_zeros(row_M.shape[0] if start_T is None else start_T.numel() - 1, value_RD.shape[1])
    weight_M = None if weight_M is None else weight_M.to(value_RD.dtype)
    summed = functional.embedding_bag(row_M, value_RD, start_T, mode="sum", per_sample_weights=weight_M)
    return summed if start_T is None else summed[:-1]


def weigh_gathered(grad_TD: Tensor, y_RD: Tensor, token_R: Tensor, weight_R: Tensor) -> tuple[Tensor, Tensor]:
    """Return w_r g_t(r), and the inner products of y_r and g_t(r)."""
    grad_RD = grad_TD.index_select(0, token_R)
    inner_R = (y_RD * grad_RD).sum(-1, dtype=weight_R.dtype)
    return grad_RD.mul_(weight_R.unsqueeze(-1)), inner_R
