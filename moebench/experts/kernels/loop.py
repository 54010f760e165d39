"""A loop over experts: the kernel that always fits."""

import torch
from torch import Tensor

from moebench.experts.kernels.groups import Groups


def fits(groups: Groups, x_RI: Tensor, other: Tensor) -> bool:
    """Return True: any dtype, device and width."""
    return True


def product(groups: Groups, x_RI: Tensor, weight_EIO: Tensor) -> Tensor:
    """Return x_r times the matrix of its expert for every row."""
    out_RO = x_RI.new_empty(x_RI.shape[0], weight_EIO.shape[2])
    # unbind, not weight[e], where autograd watches: the backward of each select would fill a whole zero stack.
    for rows, weight, out in zip(groups.split(x_RI), weight_EIO.unbind(0), groups.split(out_RO), strict=True):
        torch.mm(rows, weight, out=out)
    return out_RO


def weight_gradient(groups: Groups, x_RI: Tensor, grad_RO: Tensor) -> Tensor:
    """Return for each expert the sum over its rows of the outer product x_r g_r: zero for an idle expert."""
    out_EIO = x_RI.new_empty(len(groups.load_E), x_RI.shape[1], grad_RO.shape[1])
    for rows, grad, out in zip(groups.split(x_RI), groups.split(grad_RO), out_EIO, strict=True):
        torch.mm(rows.t(), grad, out=out)
    return out_EIO
