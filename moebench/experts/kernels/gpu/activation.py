"""Activations in one pass over the hidden units, forward and backward (see `kernels.activation` for the formulas)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moebench.experts.kernels.gpu.tiles import choose_tile

SQRT_HALF = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_2_PI = tl.constexpr(0.3989422804014327)


def activate(hidden_RF: Tensor, *, gated: bool) -> Tensor:
    """Return gelu of the hidden units, or silu of their first half times the second half."""
    hidden_RF = hidden_RF.contiguous()
    num_rows, width = hidden_RF.shape[0], hidden_RF.shape[1] // (2 if gated else 1)
    active_RF = hidden_RF.new_empty(num_rows, width)
    if active_RF.numel():
        rows, block = choose_tile(width)
        grid = (triton.cdiv(num_rows, rows), triton.cdiv(width, block))
        with torch.cuda.device_of(hidden_RF):  # Triton launches on the current device
            _activate[grid](hidden_RF, active_RF, num_rows, width, GATED=gated, ROWS=rows, BLOCK=block, num_warps=8)
    return active_RF


def activate_backward(grad_RF: Tensor, hidden_RF: Tensor, *, gated: bool) -> Tensor:
    """Return the gradient of the hidden units."""
    grad_RF, hidden_RF = grad_RF.contiguous(), hidden_RF.contiguous()
    grad_hidden_RF = torch.empty_like(hidden_RF)
    _launch_backward((grad_RF, hidden_RF, None), (grad_hidden_RF, None, None), gated=gated)
    return grad_hidden_RF


def weighted_backward(
    grad_RF: Tensor, hidden_RF: Tensor, weight_R: Tensor, *, gated: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate w_r act(h_r): return the gradient of h, w act(h) itself, and the gradient of w, fp32.

    The second result overwrites `grad_RF`, so that no further buffer is needed.
    """
    grad_RF, hidden_RF = grad_RF.contiguous(), hidden_RF.contiguous()
    grad_hidden_RF, grad_weight_R = torch.empty_like(hidden_RF), torch.empty_like(weight_R)
    _launch_backward((grad_RF, hidden_RF, weight_R), (grad_hidden_RF, grad_RF, grad_weight_R), gated=gated)
    return grad_hidden_RF, grad_RF, grad_weight_R


def _launch_backward(
    inputs: tuple[Tensor, Tensor, Tensor | None], outputs: tuple[Tensor, Tensor | None, Tensor | None], *, gated: bool
) -> None:
    num_rows, width = inputs[0].shape
    rows, block = choose_tile(width)
    if num_rows:
        with torch.cuda.device_of(inputs[0]):
            _activate_backward[(triton.cdiv(num_rows, rows),)](
                *inputs, *outputs, num_rows, width, GATED=gated, ROWS=rows, BLOCK=block, num_warps=8
            )


@triton.jit
def _activate(hidden_ptr, active_ptr, num_rows, width, GATED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row_R1 = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column_1C = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    mask = (row_R1 < num_rows) & (column_1C < width)
    if GATED:
        gate = tl.load(hidden_ptr + row_R1 * 2 * width + column_1C, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(hidden_ptr + row_R1 * 2 * width + width + column_1C, mask=mask, other=0.0).to(tl.float32)
        active = gate * tl.sigmoid(gate) * value
    else:
        hidden = tl.load(hidden_ptr + row_R1 * width + column_1C, mask=mask, other=0.0).to(tl.float32)
        active = 0.5 * hidden * (1.0 + tl.erf(hidden * SQRT_HALF))
    tl.store(active_ptr + row_R1 * width + column_1C, active.to(active_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _activate_backward(
    grad_ptr,
    hidden_ptr,
    weight_ptr,
    grad_hidden_ptr,
    weighted_ptr,
    grad_weight_ptr,
    num_rows,
    width,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row_R = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    row_R1 = row_R[:, None]
    if weight_ptr is not None:
        weight_R1 = tl.load(weight_ptr + row_R, mask=row_R < num_rows, other=0.0)[:, None]
        total_R = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        column_1C = (start + tl.arange(0, BLOCK))[None, :]
        mask = (row_R1 < num_rows) & (column_1C < width)
        grad = tl.load(grad_ptr + row_R1 * width + column_1C, mask=mask, other=0.0).to(tl.float32)
        if GATED:
            offset = row_R1 * 2 * width + column_1C
            gate = tl.load(hidden_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            value = tl.load(hidden_ptr + offset + width, mask=mask, other=0.0).to(tl.float32)
            sigmoid = tl.sigmoid(gate)
            silu = gate * sigmoid
            active = silu * value
        else:
            offset = row_R1 * width + column_1C
            hidden = tl.load(hidden_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            share = 0.5 + 0.5 * tl.erf(hidden * SQRT_HALF)
            active = hidden * share
        if weight_ptr is not None:
            total_R += tl.sum(active * grad, axis=1)
            weighted = (active * weight_R1).to(weighted_ptr.dtype.element_ty)
            tl.store(weighted_ptr + row_R1 * width + column_1C, weighted, mask=mask)
            grad *= weight_R1
        if GATED:
            grad_gate = grad * value * (sigmoid + silu * (1.0 - sigmoid))
            tl.store(grad_hidden_ptr + offset, grad_gate.to(grad_hidden_ptr.dtype.element_ty), mask=mask)
            grad_value = (grad * silu).to(grad_hidden_ptr.dtype.element_ty)
            tl.store(grad_hidden_ptr + offset + width, grad_value, mask=mask)
        else:
            slope = share + hidden * INVERSE_SQRT_2_PI * tl.exp(-0.5 * hidden * hidden)
            tl.store(grad_hidden_ptr + offset, (grad * slope).to(grad_hidden_ptr.dtype.element_ty), mask=mask)
    if weight_ptr is not None:
        tl.store(grad_weight_ptr + row_R, total_R, mask=row_R < num_rows)
