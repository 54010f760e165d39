"""Stable sorts of assignments by a small key: by torch's operators, or on a GPU by a counting sort."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moebench.routing.kernels.backend import uses_triton

MAX_KEYS = 1024
"""The counting sort has a table with a row for each key; with more keys it is larger than what torch's sort moves."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SortedKeys:
    """Where keys are after sorting; equal keys stay in their order."""

    index_N: Tensor
    """Place -> key."""
    place_N: Tensor | None = None
    """Key -> place; None: not known."""
    count_Q: Tensor | None = None
    """How many of each key are kept; None: not known."""


def count_keys(key_N: Tensor, kept_N: Tensor | None, num_keys: int) -> Tensor:
    """Return how many of each key are kept, int64."""
    # A scatter with a fixed output size: bincount would wait for the device to know the length of its result.
    ones_N = torch.ones_like(key_N) if kept_N is None else kept_N.long()
    return ones_N.new_zeros(num_keys).scatter_add(0, key_N, ones_N)


def sort_keys(key_N: Tensor, kept_N: Tensor | None, num_keys: int, *, like: Tensor) -> SortedKeys:
    """Sort keys in 0 ... num_keys - 1, those that are not kept (bool) after all others.

    `like`: values that belong to the keys, which decide whether a kernel sorts.
    """
    if num_keys <= MAX_KEYS and uses_triton(like):
        from moebench.routing.kernels.gpu import counting_sort

        index_N, place_N, count_Q = counting_sort.sort(key_N, kept_N, num_keys)
        return SortedKeys(index_N=index_N, place_N=place_N, count_Q=count_Q)
    if kept_N is not None:
        key_N = key_N.where(kept_N, num_keys)
    narrow = torch.uint8 if num_keys < 2**8 else torch.int16 if num_keys < 2**15 else torch.int64
    return SortedKeys(index_N=key_N.to(narrow).argsort(stable=True))  # a narrow key sorts in fewer passes
