"""Encode blocks of text in several threads, in order, with a bounded number of blocks in memory."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from moebench.errors import UsageError
from moebench.tasks.text.coverage import EXAMPLE_LENGTH, Coverage
from moebench.tasks.text.prepared.blocks import Block
from moebench.tasks.text.tokens import Tokenizer

BATCH_CHARACTERS = 1 << 18
"""A thread encodes so much text at once: the library's results take some 100 bytes for each token."""
BATCHES_PER_WORKER = 3

In = TypeVar("In")
Out = TypeVar("Out")


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
    batch: list[Block] = []
    size = 0
    for block in blocks:
        batch.append(block)
        size += len(block.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def map_in_order(function: Callable[[In], Out], items: Iterable[In], workers: int) -> Iterator[Out]:
    """Yield the results of a function in the order of the items, computed in threads ahead of what was taken."""
    waiting: deque[Future[Out]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="encode") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= BATCHES_PER_WORKER * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
