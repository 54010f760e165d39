"""The stored text as trivial baselines read it: symbols of the training split, and the bytes of each domain."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from moebench.tasks.baselines.measure import Values
from moebench.tasks.text.windows import require_ids

if TYPE_CHECKING:
    from moebench.tasks.language import TextTask
    from moebench.tasks.text.windows import TextSplit

SPECIAL = 256
"""Symbol of a token without bytes, such as a separator, among the bytes."""
NUM_BYTE_SYMBOLS = 257
MAX_TRAINING_TOKENS = 1 << 26
"""Tokens of the training split that are counted; of more, evenly spaced blocks."""
MAX_TRAINING_BYTES = 1 << 26
BLOCK = 1 << 16
"""Tokens of a block."""


class ByteSymbols:
    """Maps tokens to the bytes that they stand for, and tokens without bytes to `SPECIAL`."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.length_V = np.array([max(len(piece), 1) for piece in pieces])
        symbols = [np.frombuffer(piece, np.uint8) if piece else np.array([SPECIAL]) for piece in pieces]
        self._symbols = np.concatenate(symbols).astype(np.int16)
        self._start_V = np.cumsum(self.length_V) - self.length_V

    def encode(self, token_N: Values) -> Values:
        """Return the symbols of the tokens, concatenated (int16)."""
        length_N = self.length_V[token_N]
        first_N = self._start_V[token_N] - (np.cumsum(length_N) - length_N)
        index_S = np.repeat(first_N, length_N) + np.arange(length_N.sum())
        symbol_S: Values = self._symbols[index_S]
        return symbol_S


def read_byte_symbols(task: "TextTask") -> ByteSymbols:
    """Return the bytes of the tokens of a task."""
    return ByteSymbols(task.text.tokenizer.pieces())


def read_training_tokens(task: "TextTask", limit: int) -> list[Values]:
    """Return the token stream of the training split in blocks (int32); of more than `limit`, evenly spaced ones."""
    split = task.text.train
    kept, num_blocks = _count_blocks(split, limit)
    starts = (np.arange(kept) * num_blocks // kept * BLOCK).tolist()
    return [_read_tokens(split, start, start + BLOCK, task.text.vocab_size) for start in starts]


def describe_counts(task: "TextTask", limit: int) -> str:
    """Return what `read_training_tokens` reads, for a legend."""
    kept, num_blocks = _count_blocks(task.text.train, limit)
    if kept == num_blocks:
        return "counts of the training split"
    return f"counts of {kept / num_blocks:.0%} of the training split, in evenly spaced blocks"


def read_training_bytes(task: "TextTask", symbols: ByteSymbols) -> Values:
    """Return the bytes of the training split, or of `MAX_TRAINING_BYTES` of it, as symbols (int16)."""
    blocks = read_training_tokens(task, find_byte_limit(task, symbols))
    return np.concatenate([symbols.encode(block_N) for block_N in blocks])


def find_byte_limit(task: "TextTask", symbols: ByteSymbols) -> int:
    """Return the number of tokens that stand for about `MAX_TRAINING_BYTES`."""
    count_V = np.asarray(task.text.token_count_V)
    bytes_per_token = float(count_V @ symbols.length_V[: len(count_V)]) / max(int(count_V.sum()), 1)
    return int(MAX_TRAINING_BYTES / max(bytes_per_token, 1))


def read_domain_text(task: "TextTask", split: str, symbols: ByteSymbols, limit: int) -> list[bytes]:
    """Return the text of each domain in a split without separators, `limit` bytes at most; empty where it has none."""
    text: TextSplit = getattr(task.text, split)
    texts = [b""] * len(task.domains)
    for domain, start, end in text.list_domains():
        # Twice as many tokens as bytes: some are separators.
        token_N = _read_tokens(text, start, min(end, start + 2 * limit), task.text.vocab_size)
        symbol_S = symbols.encode(token_N)
        texts[domain] = symbol_S[symbol_S != SPECIAL][:limit].astype(np.uint8).tobytes()
    return texts


# Only the two functions below know how tokens are stored.


def _count_blocks(split: "TextSplit", limit: int) -> tuple[int, int]:
    """Return how many blocks are read, and all."""
    num_blocks = -(-_count_tokens(split) // BLOCK)
    return min(num_blocks, max(limit // BLOCK, 1)), num_blocks


def _count_tokens(split: "TextSplit") -> int:
    return int(split.length_D.sum())


def _read_tokens(split: "TextSplit", start: int, end: int, vocab_size: int) -> Values:
    """Return the tokens from `start` to `end`, or to the end of the stream (int32)."""
    token_N = split.tokens.read(start, end)
    require_ids(token_N, vocab_size)
    return token_N.astype(np.int32)
