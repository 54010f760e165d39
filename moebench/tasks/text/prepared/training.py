"""Train a byte-level BPE on a sample of the training split that depends on the text alone, not on its order."""

import hashlib
import heapq
import json
from collections.abc import Iterable, Iterator

from moebench.errors import UsageError
from moebench.tasks.folders import TRAIN
from moebench.tasks.text.embedded_tokenizer import train_bpe
from moebench.tasks.text.prepared.blocks import Block


def draw_sample(blocks: Iterable[Block], max_bytes: int) -> list[str]:
    """Return the blocks of the training split with the smallest hashes, of at most `max_bytes` or a single block."""
    heap: list[tuple[bytes, str]] = []  # by the inverse of the hash: the largest hash is on top
    size = 0
    for block in blocks:
        if block.split != TRAIN:
            continue
        data = block.text.encode()
        inverse = bytes(255 - value for value in hashlib.sha256(data).digest()[:8])
        heapq.heappush(heap, (inverse, block.text))
        size += len(data)
        while size > max_bytes and len(heap) > 1:
            size -= len(heapq.heappop(heap)[1].encode())
    return [text for _, text in sorted(heap, reverse=True)]


def train_tokenizer(texts: list[str], vocab_size: int) -> str:
    """Return the tokenizer.json of a byte-level BPE; its tokens restore every text."""
    if not texts:
        raise UsageError("--tokenizer: the training split has no text to train it on")
    tokenizer = train_bpe(_short_texts(texts), vocab_size)
    return json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False)


def _short_texts(texts: Iterable[str]) -> Iterator[str]:
    """Yield texts by line: the library counts words of a text at a time."""
    for text in texts:
        yield from text.splitlines(keepends=True)
