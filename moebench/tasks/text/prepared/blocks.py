"""Blocks of text: what is encoded at once, with the split that its document belongs to."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TextIO

from moebench.tasks.folders import TEST, TRAIN, VALIDATION


@dataclass(frozen=True, kw_only=True)
class Position:
    """How much of a source was read."""

    file: int = 0
    """Index of the file."""
    blocks: int = 0
    """Blocks that were read of it."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """A part of a document, or all of it."""

    text: str
    domain: str
    split: str
    is_start: bool
    """Whether a document begins with it."""
    end: Position
    """How much of the source was read with it."""


def cut_text(text: str, size: int) -> Iterator[str]:
    """Yield parts of at most `size` characters, which end with a line, or else a word, where one ends in their half."""
    start = 0
    while len(text) - start > size:
        end = _last_end(text, start, start + size)
        yield text[start:end]
        start = end
    yield text[start:]


def read_parts(file: TextIO, size: int) -> Iterator[str]:
    """Yield the text of a file in the parts that `cut_text` would make of it, keeping two in memory."""
    text = ""
    while more := file.read(size):
        text += more
        while len(text) > size:
            end = _last_end(text, 0, size)
            yield text[:end]
            text = text[end:]
    yield text


def choose_split(key: str, part: str, shares: Mapping[str, float]) -> str:
    """Return the split of a document: the one that its source assigns, or else by the hash of its key."""
    if part != TRAIN:
        return part
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64
    if number < shares[TEST]:
        return TEST
    return VALIDATION if number < shares[TEST] + shares[VALIDATION] else TRAIN


def _last_end(text: str, start: int, end: int) -> int:
    """Return where to cut before `end`: after the last line, the last space, or at `end`."""
    middle = (start + end) // 2
    for mark in ("\n", " "):
        position = text.rfind(mark, middle, end)
        if position >= 0:
            return position + 1
    return end
