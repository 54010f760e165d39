"""Classes of words by lists and endings, a light stand-in for parts of speech, for English text and code.

The classes follow the experts that ST-MoE (arXiv:2202.08906, table 13) and Shazeer et al. (arXiv:1701.06538, table 9)
name: punctuation, articles and conjunctions, verbs, proper names, numbers.
"""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from moebench.analysis.specialisation.information import Ints

CLASSES = (
    "article",
    "preposition",
    "conjunction",
    "pronoun",
    "auxiliary verb",
    "number",
    "capitalised",
    "-ing",
    "-ed",
    "-ly",
    "other word",
    "non-Latin word",
    "identifier",
    "punctuation",
    "space",
    "special",
)
WORDS = {
    "article": "a an the",
    "preposition": "of in to for with on at from by about as into like through after over between out against during "
    "without before under around among upon toward towards across behind beyond within",
    "conjunction": "and or but nor so yet because although though while if unless until since than whether",
    "pronoun": "i you he she it we they me him her us them my your his its our their mine yours hers ours theirs this "
    "that these those who whom whose which what himself herself itself themselves myself yourself",
    "auxiliary verb": "be is am are was were been being have has had having do does did will would shall should can "
    "could may might must",
    "number": "one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty hundred "
    "thousand million first second third",
}
CLASS_OF_WORD = {word: CLASSES.index(name) for name, words in WORDS.items() for word in words.split()}
PART = re.compile(
    r"(?P<space>\s+)|(?P<number>\d[\d.,]*)|(?P<word>[^\W\d]\w*(?:['\u2019][^\W\d]+)?)|(?P<punctuation>.)", re.S
)
SENTENCE_END = ".!?"
NON_LATIN = "\u0915"
"""A letter in the place of bytes that are no character: the Devanagari letter KA."""


def classify_text(text: str) -> Ints:
    """Return the class of each character: that of the word, the number, the space or the mark that it is part of."""
    class_C = np.full(len(text), CLASSES.index("punctuation"), dtype=np.int64)
    begins_sentence = True
    for match in PART.finditer(text):
        kind, piece = str(match.lastgroup), match.group()
        name = _classify_word(piece, begins_sentence=begins_sentence) if kind == "word" else CLASSES.index(kind)
        class_C[match.start() : match.end()] = name
        is_break = begins_sentence or "\n\n" in piece
        begins_sentence = is_break if kind == "space" else piece in SENTENCE_END
    return class_C


def _classify_word(word: str, *, begins_sentence: bool) -> int:
    lower = word.lower()
    if lower in CLASS_OF_WORD:
        return CLASS_OF_WORD[lower]
    if "_" in word or any(character.isdigit() for character in word) or re.search("[a-z][A-Z]", word):
        return CLASSES.index("identifier")
    if max(word) > "\u024f":  # the end of Latin Extended-B
        return CLASSES.index("non-Latin word")
    if word[0].isupper() and not begins_sentence:
        return CLASSES.index("capitalised")
    ending = next((ending for ending in ("-ing", "-ed", "-ly") if lower.endswith(ending[1:]) and len(lower) > 4), None)
    return CLASSES.index(ending or "other word")


def classify_tokens(pieces: Sequence[bytes]) -> Ints:
    """Return the class of each token of a window, by the first byte of it that is not white space.

    The word that begins a window is classified by what of it lies in the window. A token without bytes is special.
    """
    class_N = _classify_bytes(b"".join(pieces))
    special = CLASSES.index("special")
    result, start = np.full(len(pieces), special, dtype=np.int64), 0
    for index, piece in enumerate(pieces):
        if piece:
            first = start + min(len(piece) - len(piece.lstrip()), len(piece) - 1)
            result[index] = class_N[first]
        start += len(piece)
    return result


def _classify_bytes(content: bytes) -> Ints:
    """Return the class of each byte; a byte of a cut or broken character is part of a word that is not Latin."""
    text = content.decode("utf-8", errors="surrogateescape")
    class_C = classify_text("".join(NON_LATIN if _continues_word(character) else character for character in text))
    return np.repeat(class_C, [len(character.encode("utf-8", errors="surrogateescape")) for character in text])


def _continues_word(character: str) -> bool:
    """Return whether a character is a combining mark, such as a vowel sign, or a byte of a broken character."""
    return character > "\u02ff" and unicodedata.category(character) in ("Mn", "Mc", "Cs")
