"""One batched product of equal sizes: every expert is padded to the fullest, where loads are nearly equal."""

import math

import torch
from torch import Tensor

from moebench.experts.kernels import gemm_batch
from moebench.experts.kernels.groups import Groups

SPARE_ROWS, SPARE_ROWS_LOOPED = 5, 12
"""Padding rows per expert that cost as much as they save: beside one call with unequal sizes, and beside a loop in
which several threads share each product. Measured for 8 to 256 rows per expert and matrices of 64 x 128 to
512 x 2048."""

MIN_ROWS = {torch.float32: 16, torch.bfloat16: 1, torch.float16: 1}
"""Rows per expert from which one call saves more than padding costs; a type that is not listed is never padded."""


def compute_padded_capacity(loads: tuple[int, ...], dtype: torch.dtype) -> int | None:
    """Return the rows per expert at which padding costs no more than it saves, None when it costs more."""
    is_looped = torch.get_num_threads() > 1 and not gemm_batch.is_available()
    spare = SPARE_ROWS_LOOPED if is_looped else SPARE_ROWS
    fullest, mean = max(loads), sum(loads) / len(loads)
    return fullest if mean >= MIN_ROWS.get(dtype, math.inf) and fullest <= mean + spare else None


def fits(groups: Groups, x_RI: Tensor, other: Tensor) -> bool:
    """Return whether the rows are padded."""
    return groups.capacity is not None


def product(groups: Groups, x_RI: Tensor, weight_EIO: Tensor) -> Tensor:
    """Return x_r times the matrix of its expert for every row."""
    return torch.bmm(_by_expert(groups, x_RI), weight_EIO).view(-1, weight_EIO.shape[2])


def weight_gradient(groups: Groups, x_RI: Tensor, grad_RO: Tensor) -> Tensor:
    """Return for each expert the sum over its rows of the outer product x_r g_r."""
    return torch.bmm(_by_expert(groups, x_RI).transpose(1, 2), _by_expert(groups, grad_RO))


def _by_expert(groups: Groups, x_RI: Tensor) -> Tensor:
    return x_RI.view(len(groups.load_E), groups.capacity or 0, -1)
