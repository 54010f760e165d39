"""Gathers of rows, and sums of gathered rows, with loads of 16 bytes; sums are in fp32, in a fixed order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moebench.experts.kernels.gpu.tiles import MAX_BLOCK, MIN_BLOCK, choose_tile

MAX_UNROLLED = 16
"""Rows per token up to which the loop over them is unrolled, so that their loads are in flight together."""


def gather(x_TD: Tensor, index_R: Tensor) -> Tensor:
    """Return the rows of x_TD at the indices."""
    x_TD = x_TD.contiguous()
    width = x_TD.shape[1]
    out_RD = x_TD.new_empty(index_R.shape[0], width)
    if out_RD.numel():
        rows, block = choose_tile(width)
        grid = (triton.cdiv(index_R.shape[0], rows), triton.cdiv(width, block))
        with torch.cuda.device_of(x_TD):  # Triton launches on the current device
            _gather[grid](x_TD, index_R, out_RD, index_R.shape[0], width, ROWS=rows, BLOCK=block, num_warps=8)
    return out_RD


def sum_groups(value_RD: Tensor, row_M: Tensor, start_T: Tensor | None, weight_M: Tensor | None) -> Tensor:
    """Return the sum of each token's rows, [T, D] (see `kernels.rows.sum_groups`)."""
    value_RD = value_RD.contiguous()
    num_tokens, width = row_M.shape[0] if start_T is None else start_T.numel() - 1, value_RD.shape[1]
    out_TD = value_RD.new_empty(num_tokens, width)
    if out_TD.numel():
        block = min(max(triton.next_power_of_2(width), MIN_BLOCK), MAX_BLOCK)
        with torch.cuda.device_of(value_RD):
            _sum_groups[(num_tokens, triton.cdiv(width, block))](
                *(value_RD, row_M.contiguous(), start_T, None if weight_M is None else weight_M.contiguous(), out_TD),
                width,
                TOP_K=row_M.shape[1] if start_T is None else 0,
                UNROLLED=start_T is None and row_M.shape[1] <= MAX_UNROLLED,
                BLOCK=block,
                num_warps=max(block // 256, 1),
            )
    return out_TD


def weigh_gathered(grad_TD: Tensor, y_RD: Tensor, token_R: Tensor, weight_R: Tensor) -> tuple[Tensor, Tensor]:
    """Return w_r g_t(r), and the inner products of y_r and g_t(r) in fp32."""
    grad_TD, y_RD = grad_TD.contiguous(), y_RD.contiguous()
    num_rows, width = y_RD.shape
    grad_RD, inner_R = torch.empty_like(y_RD), torch.empty_like(weight_R)
    if num_rows:
        rows, block = choose_tile(width)
        with torch.cuda.device_of(y_RD):
            _weigh_gathered[(triton.cdiv(num_rows, rows),)](
                *(grad_TD, y_RD, token_R, weight_R, grad_RD, inner_R, num_rows, width),
                ROWS=rows,
                BLOCK=block,
                num_warps=8,
            )
    return grad_RD, inner_R


@triton.jit
def _gather(x_ptr, index_ptr, out_ptr, num_rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row_R = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column_1C = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    mask = (row_R[:, None] < num_rows) & (column_1C < width)
    index_R = tl.load(index_ptr + row_R, mask=row_R < num_rows, other=0)
    value = tl.load(x_ptr + index_R[:, None] * width + column_1C, mask=mask)
    tl.store(out_ptr + row_R[:, None] * width + column_1C, value, mask=mask)


@triton.jit
def _sum_groups(
    value_ptr,
    row_ptr,
    start_ptr,
    weight_ptr,
    out_ptr,
    width,
    TOP_K: tl.constexpr,
    UNROLLED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column_C = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column_C < width
    sum_C = tl.zeros((BLOCK,), dtype=tl.float32)
    if UNROLLED:
        for k in tl.static_range(TOP_K):
            row = tl.load(row_ptr + token * TOP_K + k)
            value_C = tl.load(value_ptr + row * width + column_C, mask=mask, other=0.0).to(tl.float32)
            if weight_ptr is not None:
                value_C *= tl.load(weight_ptr + token * TOP_K + k)
            sum_C += value_C
    else:
        if start_ptr is not None:
            start, end = tl.load(start_ptr + token), tl.load(start_ptr + token + 1)
        else:
            start, end = token * TOP_K, token * TOP_K + TOP_K
        for entry in range(start, end):
            row = tl.load(row_ptr + entry)
            value_C = tl.load(value_ptr + row * width + column_C, mask=mask, other=0.0).to(tl.float32)
            if weight_ptr is not None:
                value_C *= tl.load(weight_ptr + entry)
            sum_C += value_C
    tl.store(out_ptr + token * width + column_C, sum_C.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _weigh_gathered(
    grad_ptr,
    y_ptr,
    token_ptr,
    weight_ptr,
    out_ptr,
    inner_ptr,
    num_rows,
    width,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row_R = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    is_row_R = row_R < num_rows
    token_R = tl.load(token_ptr + row_R, mask=is_row_R, other=0)
    weight_R = tl.load(weight_ptr + row_R, mask=is_row_R, other=0.0)
    inner_R = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        column_1C = (start + tl.arange(0, BLOCK))[None, :]
        mask = is_row_R[:, None] & (column_1C < width)
        grad = tl.load(grad_ptr + token_R[:, None] * width + column_1C, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + row_R[:, None] * width + column_1C, mask=mask, other=0.0).to(tl.float32)
        inner_R += tl.sum(grad * y, axis=1)
        weighted = (grad * weight_R[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row_R[:, None] * width + column_1C, weighted, mask=mask)
    tl.store(inner_ptr + row_R, inner_R, mask=is_row_R)
