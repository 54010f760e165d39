"""How much of a text its tokens hold: what decoding them gives back, in bytes."""

from collections import Counter
from dataclasses import dataclass

from moebench.errors import UsageError
from moebench.tasks.sources import note

LEAST = 0.999
"""Share of the bytes of each domain: below, bits per byte would be those of another, simpler text."""
SHOWN, BEFORE = 24, 8
"""Characters of an example, and how many of them stand before the first difference."""


@dataclass
class Coverage:
    """Counts the bytes of texts that their tokens hold."""

    num_bytes: int = 0
    num_wrong: int = 0
    example: str = ""
    """The first difference: what stood there, and what came back."""

    def add(self, text: str, decoded: str) -> None:
        """Count a text, given what decoding its tokens makes of it."""
        self.num_bytes += len(text.encode())
        wrong = count_wrong_bytes(text, decoded)
        self.num_wrong += wrong
        if wrong and not self.example:
            self.example = _first_difference(text, decoded)

    @property
    def share(self) -> float:
        """Share of the bytes that come back; 1 for no text."""
        return 1 - min(self.num_wrong / self.num_bytes, 1) if self.num_bytes else 1.0

    def check(self, tokenizer: str, domain: str) -> None:
        """Raise UsageError when too much is lost, and say so on standard error when a little is."""
        if not self.num_wrong:
            return
        percent = f"{100 * self.share:.2f}" if self.share < LEAST else f"{100 * self.share:.4f}"
        found = f"'{tokenizer}' keeps {percent} % of the bytes of domain '{domain}': {self.example}"
        if self.share >= LEAST:
            note(found)
            return
        raise UsageError(
            f"task.data.tokenizer: {found}. Allowed: at least {100 * LEAST} %, such as 'bytes', or a tokenizer that"
            " falls back to bytes and changes neither case nor white space"
        )


def count_wrong_bytes(text: str, decoded: str) -> int:
    """Return the UTF-8 bytes of the characters that decoding lost, or of those that it added if they are more.

    A letter in another case, another kind of white space and an accent in another form are lost and added: they count
    once. A space before the whole text, which some tokenizers put there, is none of it. Counted without alignment, as
    a lower bound, by the characters that differ in number and, where a space is lost here and added there, by half of
    the pairs of neighbours that do: a change of one character changes two of them (Ukkonen 1992,
    doi:10.1016/0304-3975(92)90143-4).
    """
    if not text.startswith(" "):
        decoded = decoded.removeprefix(" ")
    if decoded == text:
        return 0
    characters = _num_different(Counter(text), Counter(decoded))
    pairs = _num_different(*(Counter(map(str.__add__, each, each[1:])) for each in (text, decoded)))
    return max(characters, -(-pairs // 2), 1)


def _num_different(here: Counter[str], there: Counter[str]) -> int:
    """Return by how many bytes, of first characters, one has more than the other, or the other more than it."""
    return max(
        sum(len(characters[0].encode()) * count for characters, count in more.items())
        for more in (here - there, there - here)
    )


def _first_difference(text: str, decoded: str) -> str:
    pairs = enumerate(zip(text, decoded, strict=False))
    at = next((place for place, (one, other) in pairs if one != other), min(len(text), len(decoded)))
    start = max(0, at - BEFORE)
    return f"{text[start : start + SHOWN]!r} comes back as {decoded[start : start + SHOWN]!r}"
