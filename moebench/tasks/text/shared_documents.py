"""Test documents of one prepared text that are in the training text of another: found in their tokens."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from moebench.tasks.text.ngrams import hash_ngrams
from moebench.tasks.text.overlap import THRESHOLD, OverlapIndex, Sketches
from moebench.tasks.text.windows import PreparedText, TextSplit

CHUNK_TOKENS = 1 << 20
"""Tokens of a document that are decoded together."""


@dataclass(frozen=True, kw_only=True)
class SharedDocuments:
    """How many test documents are in a training text, at least half of their 13-grams of words."""

    shared: Mapping[str, int]
    """Domain -> documents that are."""
    documents: int
    """Documents that were looked for."""

    @property
    def num_shared(self) -> int:
        """Documents that are, in all domains."""
        return sum(self.shared.values())


def find_shared_documents(trained: PreparedText, tested: PreparedText) -> SharedDocuments:
    """Look for the test documents of the trained domains of `tested` in the training text of `trained`.

    Memory depends on the test documents alone; time on both texts.
    """
    sketches, domains = Sketches(), list[str]()
    for domain, text in iterate_documents(tested, tested.test):
        if domain < len(tested.domains) - tested.num_held_out:
            sketches.add(hash_ngrams(text))
            domains.append(tested.domains[domain])
    index = OverlapIndex(sketches)
    for _, text in iterate_documents(trained, trained.train):
        index.add_training_hashes(hash_ngrams(text))
    is_shared_D = index.shares() >= THRESHOLD
    shared = Counter(domain for domain, is_shared in zip(domains, is_shared_D, strict=True) if is_shared)
    return SharedDocuments(shared=dict(shared), documents=len(domains))


def iterate_documents(text: PreparedText, split: TextSplit) -> Iterator[tuple[int, str]]:
    """Yield the domain and the text of each document of a split; of a very long one, of each part."""
    for domain, start, end in split.list_domains():
        waiting = np.empty(0, dtype=np.int64)
        for first in range(start, end, CHUNK_TOKENS):
            token_N = np.concatenate([waiting, split.tokens.read(first, min(first + CHUNK_TOKENS, end))])
            *documents, waiting = np.split(token_N, np.flatnonzero(token_N == text.separator))
            if len(waiting) >= CHUNK_TOKENS:
                documents, waiting = [*documents, waiting], waiting[:0]
            yield from ((domain, _decode(text, document)) for document in documents if len(document) > 1)
        if len(waiting) > 1:
            yield domain, _decode(text, waiting)


def _decode(text: PreparedText, token_N: np.ndarray) -> str:
    return text.tokenizer.decode_bytes(token_N[token_N != text.separator]).decode(errors="replace")
