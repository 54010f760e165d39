"""Coverage of a tokenizer: the share of the bytes of a text that decoding its tokens restores."""

from collections import Counter
from dataclasses import dataclass

from moebench.errors import UsageError
from moebench.tasks.sources import warn

MIN_COVERAGE = 0.999
"""Smallest share per domain: below, bits per byte would be those of another, simpler text."""
EXAMPLE_LENGTH, EXAMPLE_CONTEXT = 24, 8
"""Characters of an example, and how many of them precede the first difference."""


@dataclass
class Coverage:
    """Accumulates how many bytes of texts their tokens restore."""

    num_bytes: int = 0
    num_wrong: int = 0
    example: str = ""
    """The first difference between a text and its decoded tokens."""

    def add(self, text: str, decoded: str) -> None:
        """Count a text, given its decoded tokens."""
        self.num_bytes += len(text.encode())
        wrong = count_wrong_bytes(text, decoded)
        self.num_wrong += wrong
        if wrong and not self.example:
            self.example = _first_difference(text, decoded)

    def merge(self, other: "Coverage") -> None:
        """Add what was counted elsewhere; the earlier example stays."""
        self.num_bytes += other.num_bytes
        self.num_wrong += other.num_wrong
        self.example = self.example or other.example

    @property
    def share(self) -> float:
        """Share of the bytes that are restored; 1 without text."""
        return 1 - min(self.num_wrong / self.num_bytes, 1) if self.num_bytes else 1.0

    def check(self, tokenizer: str, domain: str) -> None:
        """Raise UsageError if the share is below `MIN_COVERAGE`; print a warning if it is below 1."""
        if not self.num_wrong:
            return
        percent = f"{100 * self.share:.2f}" if self.share < MIN_COVERAGE else f"{100 * self.share:.4f}"
        summary = f"'{tokenizer}' keeps {percent} % of the bytes of domain '{domain}': {self.example}"
        if self.share >= MIN_COVERAGE:
            warn(summary)
            return
        raise UsageError(
            f"task.data.tokenizer: {summary}. Allowed: at least {100 * MIN_COVERAGE} %, such as 'bytes', or a tokenizer"
            " that falls back to bytes and changes neither case nor white space"
        )


def count_wrong_bytes(text: str, decoded: str) -> int:
    """Return the UTF-8 bytes of the characters that decoding lost, or that it added if these are more.

    A replaced character (another case, white space or form of an accent) is lost and added, and counts once. A leading
    space, which some tokenizers add, is ignored. The result is a lower bound without alignment: the difference of the
    character counts or, for characters that moved, half of the difference of the counts of adjacent pairs, because a
    change of one character changes two pairs (Ukkonen 1992, doi:10.1016/0304-3975(92)90143-4).
    """
    if not text.startswith(" "):
        decoded = decoded.removeprefix(" ")
    if decoded == text:
        return 0
    characters = _count_excess_bytes(Counter(text), Counter(decoded))
    pairs = _count_excess_bytes(*(Counter(map(str.__add__, each, each[1:])) for each in (text, decoded)))
    return max(characters, -(-pairs // 2), 1)


def _count_excess_bytes(here: Counter[str], there: Counter[str]) -> int:
    """Return the bytes of first characters by which one count exceeds the other, in the direction with more."""
    return max(
        sum(len(characters[0].encode()) * count for characters, count in more.items())
        for more in (here - there, there - here)
    )


def _first_difference(text: str, decoded: str) -> str:
    pairs = enumerate(zip(text, decoded, strict=False))
    index = next((i for i, (one, other) in pairs if one != other), min(len(text), len(decoded)))
    start = max(0, index - EXAMPLE_CONTEXT)
    return f"{text[start : start + EXAMPLE_LENGTH]!r} comes back as {decoded[start : start + EXAMPLE_LENGTH]!r}"
