"""Validation and test documents that are in the training text, verbatim or nearly: found and removed."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moebench.errors import UsageError
from moebench.tasks.sources import warn
from moebench.tasks.text.document import Document
from moebench.tasks.text.ngrams import hash_ngrams

THRESHOLD = 0.5
"""Share of the 13-grams of a document, from which on it counts as known from training.

PaLM (Chowdhery et al. 2022, arXiv:2204.02311, section 8) removes examples with 70 % of their 8-grams in the training
text: a copy with one word in 22 replaced meets both limits. GPT-3 (Brown et al. 2020, arXiv:2005.14165, appendix C)
removes every example that shares one 13-gram, which in long documents is often a licence or a phrase.
"""
MAX_HASHES = 1 << 24
"""Hashes of evaluation documents that are kept, 128 MiB, divided evenly among documents."""
MOST, FEWEST = 1024, 16
"""Largest and smallest number of 13-grams that represent a document."""
MOST_NAMED = 10
"""Domains that the message names."""
BUFFER = 1 << 20
"""Hashes of training text that are looked up together."""


class Sketches:
    """The smallest hashes of the 13-grams of each evaluation document, ascending: a bottom-k sketch.

    The documents may come one after another, in parts: sketches are shortened as their number grows.
    """

    def __init__(self, max_hashes: int = MAX_HASHES) -> None:
        self.max_hashes = max_hashes
        self._sketches: list[np.ndarray] = []
        self._next_cut = 2 * max(max_hashes // MOST, 1)

    @property
    def per_document(self) -> int:
        """Largest number of hashes of a document."""
        return min(max(self.max_hashes // max(len(self._sketches), 1), FEWEST), MOST)

    def add(self, hash_N: np.ndarray, *, is_start: bool = True) -> None:
        """Add a document by the hashes of its 13-grams, or unless `is_start` a part of the latest one."""
        if is_start:
            self._sketches.append(np.empty(0, dtype=np.uint64))
        self._sketches[-1] = np.union1d(self._sketches[-1], hash_N)[: self.per_document].copy()
        if len(self._sketches) >= self._next_cut:
            self._next_cut *= 2
            self.all()

    def all(self) -> list[np.ndarray]:
        """Return the sketches, of equal length limits."""
        self._sketches = [sketch[: self.per_document].copy() for sketch in self._sketches]
        return self._sketches


class OverlapIndex:
    """Measures which share of the 13-grams of evaluation documents is in a training text of any length.

    Memory depends on the evaluation documents alone. Each is represented by its smallest hashes (a bottom-k sketch,
    Broder 1997, doi:10.1109/SEQUEN.1997.666900): all of them in a document of up to `per_document` 13-grams, whose
    share is exact; in a longer one the standard error of the share is at most 0.5 / sqrt(per_document), 1.6 % for 1,024
    and 12.5 % for 16, which is reached from a million documents on.
    """

    def __init__(self, documents: Sketches) -> None:
        sketches = documents.all()
        self._sizes_D = np.array([len(sketch) for sketch in sketches], dtype=np.int64)
        hashes_N = np.concatenate([*sketches, np.empty(0, dtype=np.uint64)])
        self._hashes_U, self._index_N = np.unique(hashes_N, return_inverse=True)
        self._is_trained_U = np.zeros(len(self._hashes_U), dtype=bool)
        self._waiting: list[np.ndarray] = []

    def add_training_hashes(self, hash_N: np.ndarray) -> None:
        """Mark the 13-grams of a training document, given as `hash_ngrams` returns them."""
        self._waiting.append(hash_N)
        if sum(map(len, self._waiting)) >= BUFFER:
            self._look_up()

    def shares(self) -> np.ndarray:
        """Return the share of the distinct 13-grams of each document that were marked; 0 for one without words."""
        self._look_up()
        starts_D = np.cumsum(self._sizes_D) - self._sizes_D
        marked_N = np.concatenate([[0], np.cumsum(self._is_trained_U[self._index_N])])
        counts_D = marked_N[starts_D + self._sizes_D] - marked_N[starts_D]
        return np.asarray(counts_D / np.maximum(self._sizes_D, 1))

    def _look_up(self) -> None:
        if self._waiting and len(self._hashes_U):
            hashes_N = np.unique(np.concatenate(self._waiting))  # sorted ones are found several times faster
            place_N = np.minimum(np.searchsorted(self._hashes_U, hashes_N), len(self._hashes_U) - 1)
            self._is_trained_U[place_N[self._hashes_U[place_N] == hashes_N]] = True
        self._waiting = []


@dataclass
class _Count:
    documents: int = 0
    removed: int = 0
    bytes: int = 0
    removed_bytes: int = 0


Rates = dict[str, dict[str, dict[str, Any]]]
"""Domain -> split -> numbers of documents and bytes, in all and removed."""


def remove_overlap(splits: Mapping[str, Sequence[Document]]) -> tuple[dict[str, list[Document]], Rates]:
    """Return the splits without the validation and test documents that the training split has, and how many these were.

    A document is removed if at least half of its 13-grams are in the training documents. The training split stays as it
    is. Prints one line if anything is removed; raises UsageError for a domain if a split keeps nothing of it.
    """
    evaluated = [(name, document) for name in splits if name != "train" for document in splits[name]]
    sketches = Sketches()
    for _, document in evaluated:
        sketches.add(hash_ngrams(document.text))
    index = OverlapIndex(sketches)
    for document in splits["train"]:
        index.add_training_hashes(hash_ngrams(document.text))
    counts: dict[tuple[str, str], _Count] = defaultdict(_Count)
    kept: dict[str, list[Document]] = {name: list(splits[name]) if name == "train" else [] for name in splits}
    for (name, document), share in zip(evaluated, index.shares(), strict=True):
        count, size = counts[document.domain, name], len(document.text.encode())
        count.documents, count.bytes = count.documents + 1, count.bytes + size
        if share >= THRESHOLD:
            count.removed, count.removed_bytes = count.removed + 1, count.removed_bytes + size
        else:
            kept[name].append(document)
    _report(counts)
    rates: Rates = {}
    for (domain, name), count in sorted(counts.items()):
        rates.setdefault(domain, {})[name] = vars(count)
    return kept, rates


def sum_removed(rates: Rates) -> dict[str, tuple[int, int]]:
    """Return domain -> evaluation documents removed, and all, of both splits."""
    return {
        domain: (sum(count["removed"] for count in splits.values()), sum(n["documents"] for n in splits.values()))
        for domain, splits in rates.items()
    }


def warn_removed(removed: Mapping[str, tuple[int, int]]) -> None:
    """Print of how many documents how many were removed, by domain, if any was."""
    parts = [f"{domain} {count} of {total}" for domain, (count, total) in sorted(removed.items()) if count]
    if parts:
        listed = ", ".join(parts[:MOST_NAMED]) + (", ..." if len(parts) > MOST_NAMED else "")
        warn(f"validation and test documents removed that the training split has too, verbatim or nearly: {listed}")


def _report(counts: Mapping[tuple[str, str], _Count]) -> None:
    for (domain, name), count in sorted(counts.items()):
        if count.removed and count.removed_bytes == count.bytes:
            raise UsageError(
                f"task.data.remove_overlap: all {count.documents} {name} documents of domain '{domain}' are in the"
                " training split, verbatim or nearly; give other text, or set task.data.remove_overlap=false"
            )
    removed: dict[str, _Count] = defaultdict(_Count)
    for (domain, _), count in sorted(counts.items()):
        removed[domain].documents += count.documents
        removed[domain].removed += count.removed
    warn_removed({domain: (count.removed, count.documents) for domain, count in removed.items()})
