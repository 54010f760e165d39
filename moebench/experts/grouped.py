"""Grouped matrix products: each expert's rows times its own matrix, by whichever kernel is fastest for the loads.

Two forms. Packed: the experts' rows lie one after another and one grouped kernel walks over them. Padded: every
expert has the same number of rows, so that one batched product computes all experts at once, each on a core of its
own; what is padded is computed for nothing.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from moebench.experts.kernels import gemm_batch

ROW_BYTES = 16
"""Of which grouped kernels want rows to be multiples."""
SPARE_ROWS, SPARE_ROWS_LOOPED = 5, 12
"""How many padding rows per expert cost as much as a product of its own costs more than a share in one batched product:
where products of unequal sizes go out in one call, and where several threads share each product in turn. Measured for
8 to 256 rows per expert and matrices of 64 x 128 to 512 x 2048."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Groups:
    """How many rows each expert has, and where they lie."""

    load_E: Tensor
    offset_E: Tensor
    """int32: where each expert's rows end when packed."""
    loads: tuple[int, ...] | None
    """The loads on the host: known on a CPU; a GPU is not asked."""
    capacity: int | None
    """Rows of every expert when padded; None when packed."""

    @classmethod
    def of(cls, load_E: Tensor, *, may_pad: bool = False) -> "Groups":
        """Choose the form: on a CPU padded if the fullest expert is hardly above the mean, else packed."""
        loads = tuple(load_E.tolist()) if load_E.device.type == "cpu" else None
        capacity = _padded_capacity(loads) if loads and may_pad else None
        return cls(load_E=load_E, offset_E=load_E.cumsum(0, dtype=torch.int32), loads=loads, capacity=capacity)

    @property
    def num_rows(self) -> int | None:
        """Rows with their padding; None where the device alone knows."""
        if self.loads is None:
            return None
        return sum(self.loads) if self.capacity is None else self.capacity * len(self.loads)

    def product(self, x_RI: Tensor, weight_EIO: Tensor) -> Tensor:
        """Return x_r times the matrix of its expert for every row."""
        num_experts, _, width = weight_EIO.shape
        if self.capacity is not None:
            return torch.bmm(x_RI.view(num_experts, self.capacity, -1), weight_EIO).view(-1, width)
        if self.loads and gemm_batch.fits(x_RI, weight_EIO):
            return gemm_batch.product(x_RI, weight_EIO, self.loads)
        if self._fits_kernel(x_RI, *weight_EIO.shape[1:]):
            return functional.grouped_mm(x_RI, weight_EIO, offs=self.offset_E)
        if self.loads is None and self._fits_kernel(x_RI):
            return self._product_of_padded(x_RI, weight_EIO)
        out_RO = x_RI.new_empty(x_RI.shape[0], width)
        # unbind, not weight[e], where autograd watches: the backward of each select would fill a whole zero stack.
        for rows, weight, out in zip(self._split(x_RI), weight_EIO.unbind(0), self._split(out_RO), strict=True):
            torch.mm(rows, weight, out=out)
        return out_RO

    def weight_gradient(self, x_RI: Tensor, grad_RO: Tensor) -> Tensor:
        """Return for each expert the sum over its rows of the outer product x_r g_r: zero for an idle expert."""
        num_experts = len(self.load_E)
        if self.capacity is not None:
            x_ECI = x_RI.view(num_experts, self.capacity, -1)
            return torch.bmm(x_ECI.transpose(1, 2), grad_RO.view(num_experts, self.capacity, -1))
        if self.loads and gemm_batch.fits(x_RI, grad_RO):
            return gemm_batch.weight_gradient(x_RI, grad_RO, self.loads)
        if self._fits_kernel(x_RI, x_RI.shape[1], grad_RO.shape[1]):
            return functional.grouped_mm(x_RI.t(), grad_RO, offs=self.offset_E)
        if self.loads is None and self._fits_kernel(x_RI):
            padded_EIO = functional.grouped_mm(_padded(x_RI).t(), _padded(grad_RO), offs=self.offset_E)
            return padded_EIO[:, : x_RI.shape[1], : grad_RO.shape[1]]
        out_EIO = x_RI.new_empty(num_experts, x_RI.shape[1], grad_RO.shape[1])
        for rows, grad, out in zip(self._split(x_RI), self._split(grad_RO), out_EIO, strict=True):
            torch.mm(rows.t(), grad, out=out)
        return out_EIO

    def _product_of_padded(self, x_RI: Tensor, weight_EIO: Tensor) -> Tensor:
        """Widths that the kernel refuses: zeros around them cost a copy, a loop over experts the wait for the loads."""
        x_RI, rest = _padded(x_RI), -weight_EIO.shape[1] % _row_step(x_RI)
        padded_EIO = functional.pad(weight_EIO, (0, -weight_EIO.shape[2] % _row_step(x_RI), 0, rest))
        return functional.grouped_mm(x_RI, padded_EIO, offs=self.offset_E)[:, : weight_EIO.shape[2]]

    def _split(self, x_RI: Tensor) -> tuple[Tensor, ...]:
        loads = list(self.loads or self.load_E.tolist())
        return torch.split(x_RI, [*loads, x_RI.shape[0] - sum(loads)])[:-1]  # the rest is nobody's

    def _fits_kernel(self, x_RI: Tensor, *widths: int) -> bool:
        """grouped_mm wants rows, 16- or 32-bit floats and strides that are multiples of 16 bytes."""
        step = _row_step(x_RI)
        return x_RI.shape[0] > 0 and x_RI.element_size() <= 4 and all(width % step == 0 for width in widths)


def _row_step(x_RI: Tensor) -> int:
    """Return of how many numbers a row must be a multiple: 16 bytes."""
    return max(ROW_BYTES // x_RI.element_size(), 1)


def _padded(x_RI: Tensor) -> Tensor:
    """Return the rows with zeros behind them, up to the next multiple of 16 bytes."""
    return functional.pad(x_RI, (0, -x_RI.shape[1] % _row_step(x_RI)))


def grouped_matmul(x_RI: Tensor, weight_EIO: Tensor, load_E: Tensor) -> Tensor:
    """Multiply each run of rows with its expert's matrix, differentiably; follows autocast like torch.mm."""
    x_RI, weight_EIO = as_autocast(x_RI, weight_EIO)
    out_RO: Tensor = _GroupedMatmul.apply(x_RI, weight_EIO, Groups.of(load_E))  # type: ignore[no-untyped-call]
    return out_RO


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in the precision in which autocast would multiply them; as they are where it is off."""
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
        return groups.product(x_RI, weight_EIO)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor, Tensor, None]:
        x_RI, weight_EIO = ctx.saved_tensors
        grad_RO = grad_RO.contiguous()
        grad_x_RI = ctx.groups.product(grad_RO, weight_EIO.transpose(1, 2))
        return grad_x_RI, ctx.groups.weight_gradient(x_RI, grad_RO), None


def _padded_capacity(loads: tuple[int, ...]) -> int | None:
    """Return the rows per expert at which padding costs no more than it saves, None when it costs more."""
    looped = torch.get_num_threads() > 1 and not gemm_batch.available()
    spare = SPARE_ROWS_LOOPED if looped else SPARE_ROWS
    fullest = max(loads)
    return fullest if 0 < fullest <= sum(loads) / len(loads) + spare else None
