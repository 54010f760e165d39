"""A stable counting sort of assignments by expert: counts by block, a prefix sum, and a position for each assignment.

Every address is written once and no atomic operation is used, so the result is the same in every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128
"""Assignments per program, each compared with all others of its block."""
LATER = tl.constexpr(2**16)


def sort(key_N: Tensor, kept_N: Tensor | None, num_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort keys from 0 to num_keys - 1; equal keys stay in order, keys that are not kept follow all others.

    Returns the index of the key at each position, the position of each key, and the number of kept keys of each value,
    all int64.
    """
    key_N = key_N.contiguous()
    num, blocks = key_N.numel(), triton.cdiv(key_N.numel(), BLOCK)
    index_N, place_N = torch.empty_like(key_N), torch.empty_like(key_N)
    count_Q = key_N.new_empty(num_keys)
    if num == 0:
        return index_N, place_N, count_Q.zero_()
    kept_N = None if kept_N is None else kept_N.contiguous()
    # One row for each key, the last row for keys that are not kept: cumulative sums are the ends of runs.
    count_QB = torch.zeros(num_keys + 1, blocks, dtype=torch.int32, device=key_N.device)
    with torch.cuda.device_of(key_N):  # Triton launches on the current device
        _rank[(blocks,)](key_N, kept_N, place_N, count_QB, num, num_keys, blocks, BLOCK=BLOCK, num_warps=8)
        end_QB = count_QB.view(-1).cumsum(0, dtype=torch.int32)
        _place[(blocks,)](
            *(key_N, kept_N, end_QB, index_N, place_N, count_Q, num, num_keys, blocks),
            BLOCK=BLOCK,
            KEYS=max(triton.next_power_of_2(num_keys), 16),
            num_warps=4,
        )
    return index_N, place_N, count_Q


@triton.jit
def _load_keys(key_ptr, kept_ptr, entry_B, is_entry_B, num_keys):
    key_B = tl.load(key_ptr + entry_B, mask=is_entry_B, other=0)
    if kept_ptr is not None:
        is_kept_B = tl.load(kept_ptr + entry_B, mask=is_entry_B, other=0).to(tl.int1)
        key_B = tl.where(is_kept_B, key_B, num_keys)
    return key_B


@triton.jit
def _rank(key_ptr, kept_ptr, rank_ptr, count_ptr, num, num_keys, num_blocks, BLOCK: tl.constexpr):
    """Store the rank of each key among the equal keys of its block; the last of them also stores their number."""
    place_B = tl.arange(0, BLOCK)
    entry_B = tl.program_id(0) * BLOCK + place_B
    is_entry_B = entry_B < num
    key_B = _load_keys(key_ptr, kept_ptr, entry_B, is_entry_B, num_keys)
    is_equal_BB = (key_B[:, None] == key_B[None, :]) & is_entry_B[None, :]
    # Both counts in one sum: the earlier ones below LATER, the later ones above.
    weight_BB = tl.where(place_B[None, :] < place_B[:, None], 1, LATER)
    total_B = tl.sum(tl.where(is_equal_BB, weight_BB, 0), axis=1) - LATER  # without the key itself
    rank_B, num_later_B = total_B % LATER, total_B // LATER
    tl.store(rank_ptr + entry_B, rank_B.to(tl.int64), mask=is_entry_B)
    slot_B = key_B * num_blocks + tl.program_id(0)
    tl.store(count_ptr + slot_B, rank_B + 1, mask=is_entry_B & (num_later_B == 0))


@triton.jit
def _place(
    key_ptr,
    kept_ptr,
    end_ptr,
    index_ptr,
    place_ptr,
    count_ptr,
    num,
    num_keys,
    num_blocks,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Add the start of the run of each key in the block to its rank there; the first program also counts the keys."""
    entry_B = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_entry_B = entry_B < num
    key_B = _load_keys(key_ptr, kept_ptr, entry_B, is_entry_B, num_keys)
    slot_B = key_B * num_blocks + tl.program_id(0)
    start_B = tl.load(end_ptr + slot_B - 1, mask=is_entry_B & (slot_B > 0), other=0)
    place_B = tl.load(place_ptr + entry_B, mask=is_entry_B, other=0) + start_B
    tl.store(place_ptr + entry_B, place_B, mask=is_entry_B)
    tl.store(index_ptr + place_B, entry_B.to(tl.int64), mask=is_entry_B)
    if tl.program_id(0) == 0:
        key_Q = tl.arange(0, KEYS).to(tl.int64)
        is_key_Q = key_Q < num_keys
        start_Q = tl.load(end_ptr + key_Q * num_blocks - 1, mask=is_key_Q & (key_Q > 0), other=0)
        end_Q = tl.load(end_ptr + (key_Q + 1) * num_blocks - 1, mask=is_key_Q, other=0)
        tl.store(count_ptr + key_Q, (end_Q - start_Q).to(tl.int64), mask=is_key_Q)
