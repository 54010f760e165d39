"""Tiles of the kernels that stream rows: how many rows and columns one program has at a time."""

import triton

TILE = 4096
"""Elements: 16 for each of the 256 threads of a program, two loads of 16 bytes in bf16."""
MAX_BLOCK = 1024
MIN_BLOCK = 16


def choose_tile(width: int) -> tuple[int, int]:
    """Return the rows and the columns of a tile, powers of two, for rows of `width` elements."""
    block = min(max(triton.next_power_of_2(width), MIN_BLOCK), MAX_BLOCK)
    return max(TILE // block, 1), block
