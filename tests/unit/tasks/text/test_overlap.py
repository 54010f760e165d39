"""Overlap of evaluation and training text, against a slow count over sets of words."""

import random
import re
from typing import Any

import numpy as np
import pytest

from moebench.errors import UsageError
from moebench.tasks.text.document import Document
from moebench.tasks.text.ngrams import NGRAM, hash_ngrams
from moebench.tasks.text.overlap import MAX_HASHES, OverlapIndex, Sketches, remove_overlap
from moebench.tasks.text.splits import split_documents

WORD = r"[\u3040-\u9fff]|(?:(?![\u3040-\u9fff])[^\W_])+"


def oracle_ngrams(text: str) -> list[tuple[str, ...]]:
    words = re.findall(WORD, text.lower())
    size = min(NGRAM, len(words))
    return [tuple(words[i : i + size]) for i in range(len(words) - size + 1)] if words else []


def random_text(draw: random.Random, num_words: int, vocabulary: int = 50) -> str:
    pieces = ["word", "Ünï", "x9", "日本", "the", "12", "Ελλ", "don't", "snake_case", "😀"]
    words = (f"{draw.choice(pieces)}{draw.randrange(vocabulary)}" for _ in range(num_words))
    return "".join(word + draw.choice([" ", "  ", ", ", "\n", " - "]) for word in words)


def document(text: str, domain: str = "a", part: str = "train") -> Document:
    return Document(text=text, domain=domain, group=text[:20], part=part)


def test_hashes_are_equal_where_ngrams_are():
    draw = random.Random(0)
    texts = [random_text(draw, n, vocabulary=1) for n in (0, 1, 5, 12, 13, 14, 40, 300)]
    texts += [texts[-1].upper(), f"! {texts[-1]}?", "", "...", "日本語のテキストです。これは十三文字以上あります。"]
    name_of: dict[int, tuple[str, ...]] = {}
    hash_of: dict[tuple[str, ...], int] = {}
    for text in texts:
        ngrams = oracle_ngrams(text)
        hashes = hash_ngrams(text).tolist()
        assert len(hashes) == len(ngrams)
        for ngram, value in zip(ngrams, hashes, strict=True):
            assert hash_of.setdefault(ngram, value) == value  # equal n-grams, equal hashes
            assert name_of.setdefault(value, ngram) == ngram  # and no others
    assert len(hash_of) > 200


def test_the_order_of_words_and_letters_counts():
    assert hash_ngrams("a b")[0] != hash_ngrams("b a")[0]
    assert hash_ngrams("ab")[0] != hash_ngrams("ba")[0] != hash_ngrams("b a")[0]
    assert hash_ngrams("aa")[0] != hash_ngrams("a a")[0]


def slow_shares(evaluated: list[str], trained: list[str]) -> list[float]:
    known = {ngram for text in trained for ngram in oracle_ngrams(text)}
    return [len(set(grams) & known) / max(len(set(grams)), 1) for grams in map(oracle_ngrams, evaluated)]


def sketch(texts: list[str], max_hashes: int = MAX_HASHES) -> Sketches:
    sketches = Sketches(max_hashes)
    for text in texts:
        sketches.add(hash_ngrams(text))
    return sketches


def test_sketches_of_parts_are_those_of_documents_at_any_number():
    draw = random.Random(7)
    hashes = [hash_ngrams(random_text(draw, draw.randrange(1, 200))) for _ in range(300)]
    sketches = Sketches(max_hashes=8192)
    for hash_N in hashes:
        sketches.add(hash_N[: len(hash_N) // 2])
        sketches.add(hash_N[len(hash_N) // 2 :], is_start=False)
    assert sketches.per_document == 8192 // 300
    for each, hash_N in zip(sketches.all(), hashes, strict=True):
        assert each.tolist() == sorted(set(hash_N.tolist()))[: 8192 // 300]


def copy_with_changes(text: str, every: int) -> str:
    words = text.split()
    return " ".join("changed" if i % every == every - 1 else word for i, word in enumerate(words))


def test_shares_are_those_of_a_slow_count():
    draw = random.Random(1)
    trained = [random_text(draw, draw.randrange(5, 400)) for _ in range(30)]
    evaluated = [random_text(draw, draw.randrange(0, 300)) for _ in range(20)]
    evaluated += [*trained[:5], trained[6][:200], copy_with_changes(trained[7], 22), "", "..."]
    evaluated += [f"{trained[8]} {random_text(draw, 200)}"]
    index = OverlapIndex(sketch(evaluated))
    for text in trained:
        index.add_training_hashes(hash_ngrams(text))
    np.testing.assert_allclose(index.shares(), slow_shares(evaluated, trained))


def test_a_long_document_is_estimated_within_its_standard_error():
    draw = random.Random(2)
    trained = [random_text(draw, 4000, vocabulary=10**6)]
    evaluated = [f"{trained[0][: len(trained[0]) * part // 10]} {random_text(draw, 3000, 10**6)}" for part in (1, 5, 9)]
    sketches = sketch(evaluated, max_hashes=3 * 256)
    assert sketches.per_document == 256
    index = OverlapIndex(sketches)
    index.add_training_hashes(hash_ngrams(trained[0]))
    error = index.shares() - slow_shares(evaluated, trained)
    assert np.abs(error).max() < 3 * 0.5 / 256**0.5


def test_verbatim_and_near_copies_are_removed_from_evaluation_alone(capsys):
    draw = random.Random(3)
    trained = [random_text(draw, 300, 10**6) for _ in range(4)]
    fresh = [random_text(draw, 300, 10**6) for _ in range(4)]
    splits: dict[str, Any] = {
        "train": [document(text) for text in trained],
        "validation": [document(text) for text in (trained[0], fresh[0], fresh[1])],
        "test": [
            document(copy_with_changes(trained[1], 30)),  # (29 / 30)^13 = .64 of its 13-grams
            document(copy_with_changes(trained[2], 10)),  # (9 / 10)^13 = .25
            document(fresh[2]),
            document(fresh[3], domain="b"),
        ],
    }
    kept, rates = remove_overlap(splits)
    assert kept["train"] == splits["train"]
    assert kept["validation"] == splits["validation"][1:]
    assert kept["test"] == splits["test"][1:]
    size = len(splits["test"][0].text.encode())
    assert rates["a"]["test"]["documents"] == 3
    assert (rates["a"]["test"]["removed"], rates["a"]["test"]["removed_bytes"]) == (1, size)
    assert rates["b"]["test"]["removed"] == 0
    assert capsys.readouterr().err.endswith("has too, verbatim or nearly: a 2 of 6\n")


def test_parts_of_one_document_do_not_overlap_by_being_neighbours():
    text = random_text(random.Random(4), 2000, 10**6)
    splits = split_documents([document(text)])
    assert [len(parts) for parts in splits.values()] == [1, 1, 1]  # cut in three
    kept, _ = remove_overlap(splits)
    assert kept == splits


def test_a_domain_that_would_keep_nothing_is_refused():
    text = random_text(random.Random(5), 100, 10**6)
    splits = {"train": [document(text)], "validation": [document(text.upper())], "test": [document("other words")]}
    with pytest.raises(UsageError, match="remove_overlap: all 1 validation documents of domain 'a' are in"):
        remove_overlap(splits)
