"""Classes of words and the alignment of transcripts: the labels that only a probe has."""

import itertools

import numpy as np
import pytest

from moebench.analysis.specialisation.ctc_alignment import align_transcript
from moebench.analysis.specialisation.token_labels import format_piece
from moebench.analysis.specialisation.word_classes import CLASSES, classify_text, classify_tokens


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the cat", ["article", "space", "other word"]),
        ("He saw London.", ["pronoun", "space", "other word", "space", "capitalised", "punctuation"]),
        ("Walking", ["-ing"]),  # a capital that begins a sentence is no name
        ("x. Then Ann", ["other word", "punctuation", "space", "other word", "space", "capitalised"]),
        ("of 1,234 is", ["preposition", "space", "number", "space", "auxiliary verb"]),
        ("my_var x2 getName", ["identifier", "space", "identifier", "space", "identifier"]),
        ("don't quickly stopped", ["other word", "space", "-ly", "space", "-ed"]),
        ("мир 日本", ["non-Latin word", "space", "non-Latin word"]),
        ("and seven", ["conjunction", "space", "number"]),
    ],
)
def test_classes_of_words(text: str, expected: list[str]) -> None:
    assert [CLASSES[key] for key, _ in itertools.groupby(classify_text(text))] == expected


def test_a_token_has_the_class_of_the_word_that_it_is_part_of() -> None:
    pieces = [b"wal", b"king", b" the", b"", b" ", b" \xd0", b"\xbc", b"!", b"\n"]
    names = [CLASSES[index] for index in classify_tokens(pieces)]
    word = "non-Latin word"
    assert names == ["-ing", "-ing", "article", "special", "space", word, word, "punctuation", "space"]


def test_a_cut_character_and_vowel_signs_are_letters() -> None:
    cut = [bytes([value]) for value in "मि".encode()[1:]]
    assert {CLASSES[index] for index in classify_tokens(cut)} == {"non-Latin word"}


@pytest.mark.parametrize(
    ("piece", "text"), [(b" a\n", "␣a↵"), (b"\xd0", "d0"), ("日".encode(), "日"), (b"\x00", "\\x00"), (b"", "")]
)
def test_pieces_are_legible(piece: bytes, text: str) -> None:
    assert format_piece(piece) == text


def collapse(path: tuple[int, ...]) -> list[int]:
    return [key for key, _ in itertools.groupby(path) if key != 0]


@pytest.mark.parametrize("target", [[], [1], [1, 2], [2, 2], [1, 2, 1]])
def test_the_alignment_is_the_best_of_all_paths(target: list[int]) -> None:
    logp_LV = np.log(np.random.default_rng(len(target)).dirichlet([1, 1, 1], size=5))
    paths = [path for path in itertools.product(range(3), repeat=5) if collapse(path) == target]
    best = max(paths, key=lambda path: sum(logp_LV[position, symbol] for position, symbol in enumerate(path)))
    assert align_transcript(logp_LV, target).tolist() == list(best)


def test_a_transcript_that_is_too_long_has_no_alignment() -> None:
    assert align_transcript(np.zeros((2, 3)), [1, 1]).tolist() == [0, 0]  # equal symbols need a blank between them
