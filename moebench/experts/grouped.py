"""Grouped matrix products: each expert's rows times its own matrix, by the first kernel that fits."""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moebench.experts.kernels import gemm_batch, grouped_mm, loop, padded_bmm
from moebench.experts.kernels.groups import Groups


class Kernel(Protocol):
    """One way to compute grouped products; each module of `kernels` is one."""

    def fits(self, groups: Groups, x_RI: Tensor, other: Tensor) -> bool:
        """Return whether the kernel can be used; `other` has one matrix per expert, or one gradient per row."""

    def product(self, groups: Groups, x_RI: Tensor, weight_EIO: Tensor) -> Tensor:
        """Return x_r times the matrix of its expert for every row."""

    def weight_gradient(self, groups: Groups, x_RI: Tensor, grad_RO: Tensor) -> Tensor:
        """Return for each expert the sum over its rows of the outer product x_r g_r: zero for an idle expert."""


KERNELS: tuple[Kernel, ...] = (padded_bmm, gemm_batch, grouped_mm, loop)
"""The fastest first; the last one always fits."""


def choose_kernel(groups: Groups, x_RI: Tensor, other: Tensor) -> Kernel:
    """Return the first kernel that fits."""
    return next(kernel for kernel in KERNELS if kernel.fits(groups, x_RI, other))


def group_rows(load_E: Tensor, *, pad_for: torch.dtype | None = None) -> Groups:
    """Choose the layout of rows: on a CPU padded if the fullest expert is hardly above the mean, else packed.

    `pad_for`: the type of rows that may be padded; None: they may not.
    """
    loads = tuple(load_E.tolist()) if load_E.device.type == "cpu" else None
    capacity = padded_bmm.compute_padded_capacity(loads, pad_for) if loads and pad_for else None
    return Groups(load_E=load_E, offset_E=load_E.cumsum(0, dtype=torch.int32), loads=loads, capacity=capacity)


def product(groups: Groups, x_RI: Tensor, weight_EIO: Tensor) -> Tensor:
    """Return x_r times the matrix of its expert for every row, without a gradient."""
    return choose_kernel(groups, x_RI, weight_EIO).product(groups, x_RI, weight_EIO)


def weight_gradient(groups: Groups, x_RI: Tensor, grad_RO: Tensor) -> Tensor:
    """Return for each expert the sum over its rows of the outer product x_r g_r: zero for an idle expert."""
    return choose_kernel(groups, x_RI, grad_RO).weight_gradient(groups, x_RI, grad_RO)


def grouped_matmul(x_RI: Tensor, weight_EIO: Tensor, load_E: Tensor) -> Tensor:
    """Multiply each run of rows with its expert's matrix, differentiably; follows autocast like torch.mm."""
    x_RI, weight_EIO = cast_for_autocast(x_RI, weight_EIO)
    out_RO: Tensor = _GroupedMatmul.apply(x_RI, weight_EIO, group_rows(load_E))  # type: ignore[no-untyped-call]
    return out_RO


def cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in the precision in which autocast would multiply them; unchanged where it is off."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


class _GroupedMatmul(torch.autograd.Function):
    """out_r = x_r W_e(r)."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, weight_EIO: Tensor, groups: Groups) -> Tensor:
        ctx.save_for_backward(x_RI, weight_EIO)
        ctx.groups = groups
        return product(groups, x_RI, weight_EIO)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor, Tensor, None]:
        x_RI, weight_EIO = ctx.saved_tensors
        grad_RO = grad_RO.contiguous()
        grad_x_RI = product(ctx.groups, grad_RO, weight_EIO.transpose(1, 2))
        return grad_x_RI, weight_gradient(ctx.groups, x_RI, grad_RO), None
