"""Gathers of rows, and sums of gathered rows, by torch's operators."""

import torch
from torch import Tensor

SUM_MODE = 0
"""The mode "sum" of an embedding bag, as torch's operators number them."""


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
    weight_M = None if weight_M is None else weight_M.to(value_RD.dtype).reshape(-1)
    is_rectangle = start_T is None
    if start_T is None:
        start_T = torch.arange(0, row_M.numel(), row_M.shape[1], device=row_M.device)
    # What `functional.embedding_bag` calls, whose checks take as long as the sums of a small layer.
    bag = value_RD, row_M.reshape(-1), start_T, False, SUM_MODE, False, weight_M
    summed: Tensor = torch.embedding_bag(*bag)[0]
    return summed if is_rectangle else summed[:-1]


def weigh_gathered(grad_TD: Tensor, y_RD: Tensor, token_R: Tensor, weight_R: Tensor) -> tuple[Tensor, Tensor]:
    """Return w_r g_t(r), and the inner products of y_r and g_t(r)."""
    grad_RD = grad_TD.index_select(0, token_R)
    inner_R = dot_rows(y_RD, grad_RD, weight_R.dtype)
    return grad_RD.mul_(weight_R.unsqueeze(-1)), inner_R


def dot_rows(x_RD: Tensor, y_RD: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the inner product of each row with the row of the same index, [R], accumulated in `dtype`."""
    if x_RD.device.type != "cpu" or x_RD.dtype != dtype or x_RD.numel() == 0:
        return (x_RD * y_RD).sum(-1, dtype=dtype)
    # The gradient of the weights of an embedding bag: one pass over memory, where a product and its sum make three.
    row_R = torch.arange(len(x_RD), device=x_RD.device)
    inner_R: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x_RD, y_RD, row_R, row_R, row_R, SUM_MODE
    )
    return inner_R
