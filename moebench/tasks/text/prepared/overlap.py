"""Validation and test documents of a source that its training split has too: found before the source is encoded."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moebench.file_access import read_plain_json
from moebench.tasks.folders import TRAIN
from moebench.tasks.text.encoding import map_in_order
from moebench.tasks.text.ngrams import hash_ngrams
from moebench.tasks.text.overlap import THRESHOLD, OverlapIndex, Sketches
from moebench.tasks.text.prepared.blocks import Block
from moebench.tasks.text.prepared.encoder import batch_blocks
from moebench.tasks.text.prepared.manifest import OVERLAP
from moebench.tasks.text.prepared.shards import write_file

ReadBlocks = Callable[[str], Iterable[Block]]
"""Called with the stage: reads the source from its beginning."""


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """The evaluation documents that are left out."""

    blocks: frozenset[tuple[int, int]] = frozenset()
    """Index of the file and number of the block in it, for each block of these documents."""
    documents: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Domain -> evaluation documents left out, and all."""

    def filter(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """Yield the blocks that are kept."""
        return (block for block in blocks if (block.end.file, block.end.blocks) not in self.blocks)


def provide_overlap(folder: Path, read_blocks: ReadBlocks, workers: int) -> Overlap:
    """Return what an earlier call measured, or else read the source twice.

    Memory is that of the hashes of evaluation documents.
    """
    measured = _read_overlap(folder)
    if measured is None:
        measured = _measure_overlap(read_blocks, workers)
        values = {"blocks": sorted(measured.blocks), "documents": measured.documents}
        write_file(folder, OVERLAP, [json.dumps(values).encode()])
    return measured


def _read_overlap(folder: Path) -> Overlap | None:
    try:
        values = read_plain_json(folder / OVERLAP)
        documents = {domain: (int(removed), int(total)) for domain, (removed, total) in values["documents"].items()}
        return Overlap(blocks=frozenset((int(file), int(n)) for file, n in values["blocks"]), documents=documents)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None


def _measure_overlap(read_blocks: ReadBlocks, workers: int) -> Overlap:
    sketches, domains = Sketches(), []
    places: list[list[tuple[int, int]]] = []
    evaluated = (block for block in read_blocks("reading evaluation text") if block.split != TRAIN)
    for block, hash_N in _hash_blocks(evaluated, workers):
        sketches.add(hash_N, is_start=block.is_start)
        if block.is_start:
            domains.append(block.domain)
            places.append([])
        places[-1].append((block.end.file, block.end.blocks))
    index = OverlapIndex(sketches)
    trained = (block for block in read_blocks("measuring overlap") if block.split == TRAIN)
    for _, hash_N in _hash_blocks(trained, workers):
        index.add_training_hashes(hash_N)
    removed = np.flatnonzero(index.shares() >= THRESHOLD).tolist()
    totals, counts = Counter(domains), Counter(domains[number] for number in removed)
    return Overlap(
        blocks=frozenset(place for number in removed for place in places[number]),
        documents={domain: (counts[domain], total) for domain, total in sorted(totals.items())},
    )


def _hash_blocks(blocks: Iterable[Block], workers: int) -> Iterator[tuple[Block, Any]]:
    """Yield each block with the hashes of its 13-grams."""
    for batch in map_in_order(_hash_batch, batch_blocks(blocks), workers):
        yield from batch


def _hash_batch(blocks: list[Block]) -> list[tuple[Block, Any]]:
    return [(block, hash_ngrams(block.text)) for block in blocks]
