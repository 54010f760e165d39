"""What is said, as symbols: normalised text, its alphabet, and how far an answer is from it."""

import re
import unicodedata
from collections.abc import Iterable, Sequence

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""Stands for the characters that no training transcript has: never right, since no model is told what it is."""


def normalise(text: str) -> str:
    """Return a transcript as it is scored: lower case, letters, digits, single spaces and apostrophes inside words.

    Notes in brackets (`[beep]`, `(laughs)`) are dropped; every other sign is a space.
    """
    text = unicodedata.normalize("NFKC", text).lower().replace("’", "'")
    text = re.sub(r"\[[^\]]*\]|\([^)]*\)", " ", text)
    kept = "".join(c if c == "'" or unicodedata.category(c)[0] in "LMN" else " " for c in text)
    return " ".join(word for word in (word.strip("'") for word in kept.split()) if word)


def alphabet(texts: Iterable[str]) -> list[str]:
    """Return the characters of the texts, sorted, behind the one for unknown characters."""
    return [UNKNOWN, *sorted(set().union(*texts))]


def collapsed(best_L: Sequence[int], blank: int = 0) -> list[int]:
    """Return what a path of CTC says: repetitions count once, blanks not at all (Graves et al. 2006)."""
    return [now for before, now in zip([blank, *best_L], best_L, strict=False) if now not in (before, blank)]


def character_errors(answers: Sequence[str], texts: Sequence[str]) -> list[int]:
    """Return, for each pair, how many characters must be inserted, deleted or replaced to make one the other."""
    from torchmetrics.functional.text import edit_distance

    found: list[int] = edit_distance(list(answers), list(texts), reduction="none").tolist()
    return found


def word_errors(answers: Sequence[str], texts: Sequence[str]) -> list[int]:
    """Return the same for words."""
    number = {word: i for i, word in enumerate({w: None for text in (*answers, *texts) for w in text.split()})}

    def as_characters(text: str) -> str:
        # The distance is one of characters: each word becomes a character of its own, beyond the surrogates.
        return "".join(chr(0x10000 + number[word]) for word in text.split())

    return character_errors([as_characters(text) for text in answers], [as_characters(text) for text in texts])
