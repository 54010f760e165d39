import random

import pytest

from moebench.tasks.audio.transcripts import (
    UNKNOWN,
    build_alphabet,
    collapse_path,
    count_character_errors,
    count_word_errors,
    normalise,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Please  enter, the NUMBER.", "please enter the number"),
        ("It's the caller's 'own'", "it's the caller's own"),
        ("L’opération (bruit) [beep] numéro", "l'opération numéro"),
        ("voice-mail / at [@]", "voice mail at"),
        ("Ёлка — Нажмите", "ёлка нажмите"),
        ("e\N{COMBINING ACUTE ACCENT}", "é"),
        ("call 911!", "call 911"),
        ("...", ""),
    ],
)
def test_normalise(text, expected):
    assert normalise(text) == expected


def test_alphabet_leads_with_the_unknown():
    assert build_alphabet(["ab", "ca "]) == [UNKNOWN, " ", "a", "b", "c"]


@pytest.mark.parametrize(
    ("path", "expected"),
    [([0, 1, 1, 0, 1, 2, 2], [1, 1, 2]), ([1, 1, 1], [1]), ([0, 0], []), ([3, 0, 3], [3, 3]), ([], [])],
)
def test_a_path_is_collapsed_as_in_ctc(path, expected):
    assert collapse_path(path) == expected


def test_character_errors_by_hand():
    # kitten -> sitting: k/s, e/i, +g; an empty answer lacks all characters.
    assert count_character_errors(["kitten", "", "same", "xsame"], ["sitting", "abc", "same", "same"]) == [3, 3, 0, 1]


def test_word_errors_by_hand():
    # "a cat sat" for "the cat sat down": one word replaced, one missing. "dog cat": both replaced.
    answers, texts = ["a cat sat", "dog cat", ""], ["the cat sat down", "cat dog", "one two"]
    assert count_word_errors(answers, texts) == [2, 2, 2]


def test_errors_over_a_set_are_those_of_torchmetrics():
    from torchmetrics.functional.text import char_error_rate, word_error_rate

    draw = random.Random(0)
    words = ["".join(draw.choices("abcé", k=draw.randint(1, 4))) for _ in range(60)]
    texts, answers = ([" ".join(draw.choices(words, k=draw.randint(1, 6))) for _ in range(40)] for _ in range(2))
    answers[3] = ""
    num_characters, num_words = sum(map(len, texts)), sum(len(text.split()) for text in texts)
    assert sum(count_character_errors(answers, texts)) / num_characters == pytest.approx(
        float(char_error_rate(answers, texts))
    )
    assert sum(count_word_errors(answers, texts)) / num_words == pytest.approx(float(word_error_rate(answers, texts)))
