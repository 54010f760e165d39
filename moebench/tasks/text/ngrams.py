"""Hashes of the word 13-grams of a text, by which texts are recognised in others."""

from functools import lru_cache

import numpy as np

NGRAM = 13
"""Words of an n-gram (Brown et al. 2020, arXiv:2005.14165, appendix C)."""
_LONGEST_WORD = 64
"""Characters after which the rest of a word no longer counts by position."""
_WORD_BASE, _NGRAM_BASE = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)


def hash_ngrams(text: str) -> np.ndarray:
    """Return the hash (uint64) of each 13-gram of words, in order; one hash of all words for a text of fewer words.

    Words are runs of letters and digits in lower case; a Chinese or Japanese character is a word of its own. Two
    different n-grams of the same length have the same hash with a probability near 2^-64.
    """
    words_W = _hash_words(text)
    if not len(words_W):
        return words_W
    size = min(NGRAM, len(words_W))
    sums_N, scale = np.zeros(len(words_W) - size + 1, dtype=np.uint64), np.uint64(size)
    with np.errstate(over="ignore"):  # products are meant modulo 2^64
        for offset in range(size):
            scale = scale * _NGRAM_BASE
            sums_N += words_W[offset : offset + len(sums_N)] * scale
    return _mix(sums_N)


def _hash_words(text: str) -> np.ndarray:
    """Return the hash (uint64) of each word."""
    code_C = np.frombuffer(text.lower().encode("utf-32-le"), dtype=np.uint32)
    is_single_C = ((code_C >= 0x3040) & (code_C <= 0x9FFF)) | ((code_C >= 0x20000) & (code_C <= 0x3FFFF))
    is_word_C = np.where(code_C <= 0xFFFF, _word_table()[code_C & 0xFFFF], is_single_C)
    is_single_C &= is_word_C
    # A word begins where a letter follows something else, and at each character that is a word of its own.
    begins_C = is_word_C.copy()
    begins_C[1:] &= ~is_word_C[:-1] | is_single_C[1:] | is_single_C[:-1]
    start_W = np.flatnonzero(begins_C)
    if not len(start_W):
        return np.empty(0, dtype=np.uint64)
    word_C = np.cumsum(begins_C) - 1
    position_C = np.arange(len(code_C)) - start_W[np.maximum(word_C, 0)]
    power_C = _POWERS[position_C.clip(0, _LONGEST_WORD)]
    return _mix(np.add.reduceat(np.where(is_word_C, code_C * power_C, np.uint64(0)), start_W))


def _mix(value_N: np.ndarray) -> np.ndarray:
    """Spread the bits of each value (the finaliser of SplitMix64, Steele et al. 2014, doi:10.1145/2660193.2660195)."""
    value_N = (value_N ^ (value_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value_N = (value_N ^ (value_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(value_N ^ (value_N >> np.uint64(31)))


@lru_cache(maxsize=1)
def _word_table() -> np.ndarray:
    """Return which characters of the Basic Multilingual Plane are letters or digits."""
    return np.array([chr(code).isalnum() for code in range(1 << 16)])


def _compute_powers() -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.cumprod(np.full(_LONGEST_WORD + 1, _WORD_BASE, dtype=np.uint64))


_POWERS = _compute_powers()
