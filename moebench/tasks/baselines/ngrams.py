"""Interpolated n-grams over any symbols: counted by sorting integers, smoothed without a parameter.

Witten-Bell smoothing (Witten and Bell 1991, method C, doi:10.1109/18.87000; interpolated as by Chen and Goodman 1999,
doi:10.1006/csla.1999.0128):

    p_n(s | h) = (count(h s) + T(h) · p_{n-1}(s | h')) / (count(h) + T(h)),    p_0 = 1 / number of symbols

where T(h) is the number of different symbols after the context h, and h' is h without its symbol farthest from s. For a
context that training does not have, p_n = p_{n-1}.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from moebench.tasks.baselines.measure import Values

LEFT = (-1, -2, -3, -4)
"""Positions of the context relative to the predicted symbol, the nearest first: orders 1 to 5."""
TWO_SIDED = (-1, 1, -2, 2)
CHUNK = 1 << 22
"""Symbols whose n-grams are sorted at a time: 32 MiB of keys."""
MISSING = -1
"""In place of a symbol of the context that is outside the text or hidden."""


@dataclass(frozen=True, eq=False)
class _Order:
    """The n-grams of one order; a key is the digits of the context, the farthest first, then the symbol."""

    key_K: Values
    """Sorted (int64)."""
    count_K: Values
    context_C: Values
    """Keys without the symbol, sorted."""
    total_C: Values
    """Occurrences of each context."""
    distinct_C: Values
    """Different symbols after each context."""


class NgramModel:
    """Counts of n-grams of orders 1 to len(offsets) + 1 with contexts at these offsets."""

    def __init__(self, symbol_N: Values, num_symbols: int, offsets: Sequence[int] = LEFT) -> None:
        """Count in a text of symbols from 0 to num_symbols - 1.

        A position counts in an order if its whole context is in the text. Needs 16 bytes per different n-gram of the
        largest order, and a third of a gigabyte at most beside them.
        """
        self.num_symbols, self.offsets = num_symbols, tuple(offsets)
        self._base = num_symbols + 1  # the additional digit stands outside the text
        require_orders(num_symbols, len(offsets) + 1)
        key_K, count_K = self._count_longest(symbol_N)
        self._orders = [self._reduce(key_K, count_K, order) for order in range(1, len(offsets) + 2)]

    def compute_nats(self, target_N: Values, context_CN: Sequence[Values]) -> Values:
        """Return the code length of each symbol by each order, [orders, N] in nats.

        `context_CN`: the symbol at each offset, `MISSING` where there is none; an order whose context is not complete
        predicts what the order below does.
        """
        p_N = np.full(len(target_N), 1 / self.num_symbols)
        context_N, is_known_N = np.zeros(len(target_N), np.int64), np.ones(len(target_N), dtype=bool)
        nats = []
        for index, order in enumerate(self._orders):
            if index:
                is_known_N = is_known_N & (context_CN[index - 1] != MISSING)
                context_N = context_N + context_CN[index - 1] * self._base ** (index - 1)
            self._interpolate(order, p_N, np.flatnonzero(is_known_N), target_N, context_N)
            nats.append(-np.log(p_N))
        return np.stack(nats)

    def _interpolate(self, order: _Order, p_N: Values, index_I: Values, target_N: Values, context_N: Values) -> None:
        """Replace p_N at the given positions by the estimate of the next order."""
        place_I = np.minimum(np.searchsorted(order.context_C, context_N[index_I]), len(order.context_C) - 1)
        is_seen_I = order.context_C[place_I] == context_N[index_I]
        index_I, place_I = index_I[is_seen_I], place_I[is_seen_I]
        key_I = context_N[index_I] * self._base + target_N[index_I]
        at_I = np.minimum(np.searchsorted(order.key_K, key_I), len(order.key_K) - 1)
        count_I = np.where(order.key_K[at_I] == key_I, order.count_K[at_I], 0)
        distinct_I = order.distinct_C[place_I]
        p_N[index_I] = (count_I + distinct_I * p_N[index_I]) / (order.total_C[place_I] + distinct_I)

    def _count_longest(self, symbol_N: Values) -> tuple[Values, Values]:
        """Return the keys of the largest order, sorted, and their counts; positions outside are the last symbol."""
        reach = max(map(abs, self.offsets), default=0)
        key_K, count_K = np.empty(0, np.int64), np.empty(0, np.int64)
        for start in range(0, len(symbol_N), CHUNK):
            end = min(start + CHUNK, len(symbol_N))
            padded = np.full(end - start + 2 * reach, self.num_symbols, np.int64)
            first, last = max(start - reach, 0), min(end + reach, len(symbol_N))
            padded[first - start + reach : last - start + reach] = symbol_N[first:last]
            columns = [padded[reach + offset : reach + offset + end - start] for offset in (*self.offsets[::-1], 0)]
            keys, counts = np.unique(reduce(lambda key, column: key * self._base + column, columns), return_counts=True)
            key_K, count_K = _sum_equal(np.concatenate([key_K, keys]), np.concatenate([count_K, counts]))
        return key_K, count_K

    def _reduce(self, key_K: Values, count_K: Values, order: int) -> _Order:
        """Return the n-grams of an order from those of the largest one."""
        key_K = key_K % self._base**order
        is_inside_K = np.ones(len(key_K), dtype=bool)
        for position in range(1, order):
            is_inside_K &= key_K // self._base**position % self._base != self.num_symbols
        key_K, count_K = _sum_equal(key_K[is_inside_K], count_K[is_inside_K])
        if not len(key_K):  # a text shorter than the order: a context that no text has
            key_K, count_K = np.array([-1]), np.array([0])
        context_K = key_K // self._base
        start_C = np.flatnonzero(np.diff(context_K, prepend=-2))
        return _Order(
            key_K=key_K,
            count_K=count_K,
            context_C=context_K[start_C],
            total_C=np.add.reduceat(count_K, start_C),
            distinct_C=np.diff(start_C, append=len(key_K)),
        )


def max_order(num_symbols: int, wanted: int) -> int:
    """Return the largest order, `wanted` at most, whose keys are 63-bit numbers."""
    return next(order for order in range(wanted, 0, -1) if (num_symbols + 1) ** order < 2**63)


def require_orders(num_symbols: int, order: int) -> None:
    """Raise ValueError if keys of this order would not be 63-bit numbers."""
    if max_order(num_symbols, order) < order:
        raise ValueError(f"n-grams of order {order} of {num_symbols} symbols do not fit into 63 bits")


def read_context(symbol_N: Values, position_N: Values, length_N: Values, offset: int) -> Values:
    """Return the symbol at an offset from each one, `MISSING` outside the sequence that it belongs to.

    `position_N`: its position in the sequence; `length_N`: the length of that. Sequences are concatenated.
    """
    at_N = position_N + offset
    shifted_N = np.roll(symbol_N, -offset)
    return np.where((at_N >= 0) & (at_N < length_N), shifted_N, MISSING)


def _sum_equal(key_N: Values, count_N: Values) -> tuple[Values, Values]:
    """Return the different keys, sorted, with the sum of the counts of each."""
    order_N = np.argsort(key_N, kind="stable")  # of sorted runs it merges
    key_N, count_N = key_N[order_N], count_N[order_N]
    is_first_N = np.ones(len(key_N), dtype=bool)
    is_first_N[1:] = key_N[1:] != key_N[:-1]
    start_K = np.flatnonzero(is_first_N)
    return key_N[start_K], np.add.reduceat(count_N, start_K) if len(start_K) else count_N
