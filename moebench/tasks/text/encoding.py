"""Encode documents in several threads, in order."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from moebench.cores import available_cores
from moebench.tasks.text.coverage import Coverage
from moebench.tasks.text.document import Document
from moebench.tasks.text.tokens import Tokenizer

BATCH_CHARACTERS = 1 << 18
"""A thread encodes so much text at once: the library's results take some 100 bytes for each token."""
BATCHES_PER_WORKER = 3

In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedDocument:
    """The tokens of a document, without a separator."""

    token_N: np.ndarray
    count_N: np.ndarray
    """UTF-8 bytes of each token."""
    coverage: Coverage
    """What decoding the tokens restores."""


def encode_documents(documents: Sequence[Document], tokenizer: Tokenizer) -> Iterator[EncodedDocument]:
    """Yield the tokens of each document.

    Raises UsageError for characters that the tokenizer cannot encode.
    """
    # Each thread encodes its own batches; the library would start as many threads as there are cores in each call.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def encode(batch: list[str]) -> list[EncodedDocument]:
        encoded = tokenizer.encode_texts(batch)
        return [_check(text, *tokens, tokenizer) for text, tokens in zip(batch, encoded, strict=True)]

    batches = split_by_size((document.text for document in documents), len, BATCH_CHARACTERS)
    for encoded in map_in_order(encode, batches, available_cores()):
        yield from encoded


def _check(text: str, token_N: np.ndarray, count_N: np.ndarray | None, tokenizer: Tokenizer) -> EncodedDocument:
    coverage, table_V = Coverage(), tokenizer.byte_count_V
    if count_N is not None or table_V is None:
        assert count_N is not None
        coverage.add(text, tokenizer.decode(token_N))
    else:
        count_N = table_V[token_N]
        # Bytes are compared first: decoding them is needed only to count what differs.
        data = tokenizer.decode_bytes(token_N)
        if data == text.encode():
            coverage.num_bytes = len(data)
        else:
            coverage.add(text, data.decode(errors="replace"))
    return EncodedDocument(token_N=token_N, count_N=count_N, coverage=coverage)


def split_by_size(items: Iterable[In], size_of: Callable[[In], int], least: int) -> Iterator[list[In]]:
    """Yield consecutive items together until their sizes add up to `least`."""
    batch: list[In] = []
    size = 0
    for item in items:
        batch.append(item)
        size += size_of(item)
        if size >= least:
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
