"""Encode blocks of text; several threads may do so at once."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moebench.errors import UsageError
from moebench.tasks.text.coverage import EXAMPLE_LENGTH, Coverage
from moebench.tasks.text.encoding import BATCH_CHARACTERS, split_by_size
from moebench.tasks.text.prepared.blocks import Block
from moebench.tasks.text.tokens import Tokenizer


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedBlock:
    """The tokens of a block."""

    block: Block
    """The block without its text."""
    token_N: np.ndarray
    count_N: np.ndarray | None
    """UTF-8 bytes of each token; None where the vocabulary has them."""
    coverage: Coverage
    """What decoding the tokens restores."""


class BlockEncoder:
    """Encodes blocks; it may be called by several threads at once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        # Each call encodes in its own thread; the library would start as many threads as there are cores.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self.tokenizer = tokenizer
        self.token_type: type[np.unsignedinteger[Any]] = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32

    def encode(self, blocks: list[Block]) -> list[EncodedBlock]:
        """Return the tokens of blocks."""
        encoded = self.tokenizer.encode_texts([block.text for block in blocks])
        return [self._check(block, *tokens) for block, tokens in zip(blocks, encoded, strict=True)]

    def _check(self, block: Block, token_N: np.ndarray, count_N: np.ndarray | None) -> EncodedBlock:
        coverage = Coverage()
        if count_N is None:
            data = block.text.encode()
            if self.tokenizer.decode_bytes(token_N) != data:
                raise UsageError(f"task.data.tokenizer: its tokens of {block.text[:EXAMPLE_LENGTH]!r} are another text")
            coverage.num_bytes = len(data)
        else:
            coverage.add(block.text, self.tokenizer.decode(token_N))
            count_N = count_N.astype(np.min_scalar_type(int(count_N.max(initial=0))))
        return EncodedBlock(
            block=replace(block, text=""),
            token_N=token_N.astype(self.token_type),
            count_N=count_N,
            coverage=coverage,
        )


def batch_blocks(blocks: Iterable[Block]) -> Iterator[list[Block]]:
    """Yield consecutive blocks together until they have `BATCH_CHARACTERS`."""
    return split_by_size(blocks, lambda block: len(block.text), BATCH_CHARACTERS)
