"""Arrays of tokens that are read as if they were one array: the parts of a stream lie in several files."""

from collections.abc import Iterator, Sequence

import numpy as np


class TokenStream:
    """The concatenation of arrays; only what is read is copied."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts = [part for part in parts if len(part)]
        self._end_P = np.cumsum([len(part) for part in self.parts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._end_P[-1]) if self.parts else 0

    def gather(self, start_B: np.ndarray, length: int) -> np.ndarray:
        """Return `length` items from each start: int64 [B, length]."""
        if len(self.parts) == 1:
            return np.asarray(self.parts[0][start_B[:, None] + np.arange(length)], dtype=np.int64)
        rows_BL = np.empty((len(start_B), length), dtype=np.int64)
        for row_L, start in zip(rows_BL, start_B.tolist(), strict=True):
            self._copy(start, row_L)
        return rows_BL

    def read(self, start: int, end: int) -> np.ndarray:
        """Return the items from `start` to `end`, or to the last one (int64)."""
        items_N: np.ndarray = self.gather(np.array([start]), max(min(end, len(self)) - start, 0))[0]
        return items_N

    def chunks(self, size: int = 1 << 22) -> Iterator[np.ndarray]:
        """Yield all items in order, in arrays of at most `size`."""
        for part in self.parts:
            yield from (part[start : start + size] for start in range(0, len(part), size))

    def _copy(self, start: int, row_L: np.ndarray) -> None:
        index, copied = int(np.searchsorted(self._end_P, start, side="right")), 0
        while copied < len(row_L):
            part = self.parts[index]
            first = start + copied - (int(self._end_P[index]) - len(part))
            piece = part[first : first + len(row_L) - copied]
            row_L[copied : copied + len(piece)] = piece
            copied, index = copied + len(piece), index + 1
