"""The order of training windows in each epoch: position to window, as a function of the seed and the epoch."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

EpochOrder = Callable[[int, int, int, np.ndarray], np.ndarray]
"""(number of windows, seed, epoch, positions [N]) -> the windows at these positions (int64 [N]), a bijection."""

NUM_ROUNDS = 6


def order_by_permutation(num_windows: int, seed: int, epoch: int, position_N: np.ndarray) -> np.ndarray:
    """Look up positions in a random permutation, which takes 8 bytes for each window."""
    index_N: np.ndarray = _permutation(num_windows, seed, epoch)[position_N]
    return index_N


def order_by_cipher(num_windows: int, seed: int, epoch: int, position_N: np.ndarray) -> np.ndarray:
    """Encrypt positions by a Feistel network (Luby and Rackoff 1988, doi:10.1137/0217022): no table is in memory.

    The network permutes the next power of four; a result outside the windows is encrypted again until it is inside.
    """
    half_bits = max(1, -(-max(num_windows - 1, 1).bit_length() // 2))
    keys = np.random.SeedSequence([seed, epoch]).generate_state(NUM_ROUNDS, dtype=np.uint64)
    index_N = _encrypt(position_N.astype(np.uint64), half_bits, keys)
    while (outside_N := index_N >= num_windows).any():
        index_N[outside_N] = _encrypt(index_N[outside_N], half_bits, keys)
    return index_N.astype(np.int64)


@lru_cache(maxsize=4)
def _permutation(num_windows: int, seed: int, epoch: int) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
    order_W = generator.permutation(num_windows)
    order_W.flags.writeable = False  # it is shared by all callers
    return order_W


def _encrypt(value_N: np.ndarray, half_bits: int, keys: np.ndarray) -> np.ndarray:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left_N, right_N = value_N >> shift, value_N & mask
    for key in keys:
        left_N, right_N = right_N, left_N ^ (_mix(right_N + key) & mask)
    result_N: np.ndarray = (left_N << shift) | right_N
    return result_N


def _mix(value_N: np.ndarray) -> np.ndarray:
    """Return a hash of each value: the finalizer of SplitMix64 (doi:10.1145/2660193.2660195)."""
    value_N = (value_N ^ (value_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value_N = (value_N ^ (value_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed_N: np.ndarray = value_N ^ (value_N >> np.uint64(31))
    return mixed_N
