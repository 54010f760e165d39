"""Transcripts: normalised text, its alphabet, and edit distances."""

import re
import unicodedata
from collections.abc import Iterable, Sequence

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""Placeholder for characters that no training transcript has: a model never predicts it correctly."""


def normalise(text: str) -> str:
    """Return a transcript as it is scored: lower-case letters, digits, single spaces and apostrophes inside words.

    Notes in brackets (`[beep]`, `(laughs)`) are dropped; every other character becomes a space.
    """
    text = unicodedata.normalize("NFKC", text).lower().replace("’", "'")
    text = re.sub(r"\[[^\]]*\]|\([^)]*\)", " ", text)
    kept = "".join(c if c == "'" or unicodedata.category(c)[0] in "LMN" else " " for c in text)
    return " ".join(word for word in (word.strip("'") for word in kept.split()) if word)


def build_alphabet(texts: Iterable[str]) -> list[str]:
    """Return the character for unknown ones and the characters of the texts, sorted."""
    return [UNKNOWN, *sorted(set().union(*texts))]


def collapse_path(best_L: Sequence[int], blank: int = 0) -> list[int]:
    """Return the labels of a CTC path: merge repetitions, then remove blanks (Graves et al. 2006)."""
    return [now for before, now in zip([blank, *best_L], best_L, strict=False) if now not in (before, blank)]


def count_character_errors(answers: Sequence[str], texts: Sequence[str]) -> list[int]:
    """Return the edit distance of each pair: inserted, deleted and replaced characters."""
    from torchmetrics.functional.text import edit_distance

    distances: list[int] = edit_distance(list(answers), list(texts), reduction="none").tolist()
    return distances


def count_word_errors(answers: Sequence[str], texts: Sequence[str]) -> list[int]:
    """Return the word-level edit distance of each pair."""
    number = {word: i for i, word in enumerate({w: None for text in (*answers, *texts) for w in text.split()})}

    def encode_words(text: str) -> str:
        # One character per word, beyond the surrogates, because `edit_distance` compares characters.
        return "".join(chr(0x10000 + number[word]) for word in text.split())

    return count_character_errors([encode_words(text) for text in answers], [encode_words(text) for text in texts])
