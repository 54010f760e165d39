"""torch's grouped product, with the ends of the groups on the device.

The kernel takes rows of 16- or 32-bit floats whose size is a multiple of 16 bytes. Where the loads are on a GPU, other
widths are padded with zeros: that costs a copy, whereas a loop over experts would wait for the loads.
"""

import torch
from torch import Tensor
from torch.nn import functional

from moebench.experts.kernels.groups import Groups

ROW_BYTES = 16
"""The size of a row in bytes must be a multiple of this."""


def fits(groups: Groups, x_RI: Tensor, other: Tensor) -> bool:
    """Return whether the kernel takes the rows; `other` has one matrix per expert, or one gradient per row."""
    takes_rows = x_RI.shape[0] > 0 and x_RI.element_size() <= 4
    if torch.compiler.is_compiling() and x_RI.dtype != torch.bfloat16 and x_RI.device.type == "cpu":
        return False  # torch's tracing knows the product on a CPU in bf16 only
    return takes_rows and (groups.loads is None or _is_aligned(x_RI, other))


def product(groups: Groups, x_RI: Tensor, weight_EIO: Tensor) -> Tensor:
    """Return x_r times the matrix of its expert for every row."""
    if _is_aligned(x_RI, weight_EIO):
        return functional.grouped_mm(x_RI, weight_EIO, offs=groups.offset_E)
    step, (_, num_in, num_out) = _row_step(x_RI), weight_EIO.shape
    padded_EIO = functional.pad(weight_EIO, (0, -num_out % step, 0, -num_in % step))
    return functional.grouped_mm(_pad_rows(x_RI), padded_EIO, offs=groups.offset_E)[:, :num_out]


def weight_gradient(groups: Groups, x_RI: Tensor, grad_RO: Tensor) -> Tensor:
    """Return for each expert the sum over its rows of the outer product x_r g_r: zero for an idle expert."""
    if _is_aligned(x_RI, grad_RO):
        return functional.grouped_mm(x_RI.t(), grad_RO, offs=groups.offset_E)
    padded_EIO = functional.grouped_mm(_pad_rows(x_RI).t(), _pad_rows(grad_RO), offs=groups.offset_E)
    return padded_EIO[:, : x_RI.shape[1], : grad_RO.shape[1]]


def _is_aligned(x_RI: Tensor, other: Tensor) -> bool:
    step = _row_step(x_RI)
    return x_RI.shape[1] % step == 0 and other.shape[-1] % step == 0


def _row_step(x_RI: Tensor) -> int:
    """Return the number of elements in `ROW_BYTES`."""
    return max(ROW_BYTES // x_RI.element_size(), 1)


def _pad_rows(x_RI: Tensor) -> Tensor:
    return functional.pad(x_RI, (0, -x_RI.shape[1] % _row_step(x_RI)))
