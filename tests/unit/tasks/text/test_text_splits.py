import random
import re
from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebench.errors import UsageError
from moebench.tasks.text.document import Document
from moebench.tasks.text.sources import TextDataConfig, load_documents
from moebench.tasks.text.splits import SPLITS, assign_splits, cut, split_documents

# Rows of (group, domain, size): groups may lie in several domains and have several documents.
ROWS = st.lists(
    st.tuples(st.sampled_from("abcdefghijkl"), st.sampled_from("xyz"), st.integers(0, 1000)),
    min_size=1,
    max_size=60,
)


def assign(rows: list[tuple[str, str, int]]) -> list[str]:
    groups, domains, sizes = zip(*rows, strict=True)
    return assign_splits(groups, domains, sizes)


@pytest.fixture(scope="module")
def pack() -> dict[str, list[Document]]:
    return split_documents(load_documents(TextDataConfig()))


def test_hand_worked_example():
    # 100 bytes: the largest (70) fits train alone; 10 fits all and test and validation lack more than train.
    rows = [("a", "d", 70), ("b", "d", 10), ("c", "d", 10), ("e", "d", 10)]
    assert assign(rows)[0] == "train"
    assert Counter(assign(rows)) == {"train": 2, "validation": 1, "test": 1}
    # Three equal groups: one each, whatever the shares.
    assert sorted(assign([("a", "d", 5), ("b", "d", 5), ("c", "d", 5)])) == ["test", "train", "validation"]


@given(ROWS, st.randoms(use_true_random=False))
def test_groups_are_not_divided_and_order_does_not_matter(rows, order: random.Random):
    try:
        assigned = assign(rows)
    except UsageError as error:
        assert "task.data.group_column: domain" in str(error)  # noqa: PT017 - some drawn rows cannot be divided
        return
    splits_of = defaultdict(set)
    for (group, _, _), split in zip(rows, assigned, strict=True):
        splits_of[group].add(split)
    assert all(len(splits) == 1 for splits in splits_of.values())
    for domain in {domain for _, domain, _ in rows}:
        got = {split for (_, other, _), split in zip(rows, assigned, strict=True) if other == domain}
        assert got == set(SPLITS)
    shuffled = list(range(len(rows)))
    order.shuffle(shuffled)
    assert assign([rows[i] for i in shuffled]) == [assigned[i] for i in shuffled]


@given(st.dictionaries(st.text(max_size=5), st.integers(0, 10**6), min_size=3, max_size=40))
def test_a_domain_of_three_groups_is_never_refused(sizes):
    assert set(assign([(group, "d", size) for group, size in sizes.items()])) == set(SPLITS)


@given(st.lists(st.integers(1, 100), min_size=200, max_size=300))
def test_many_small_groups_meet_the_shares_closely(sizes):
    assigned = assign([(str(i), "d", size) for i, size in enumerate(sizes)])
    share = Counter()
    for split, size in zip(assigned, sizes, strict=True):
        share[split] += size / sum(sizes)
    # No split is further off than one group, the largest.
    tolerance = max(sizes) / sum(sizes)
    assert abs(share["train"] - 0.8) <= tolerance
    assert abs(share["validation"] - 0.1) <= tolerance
    assert abs(share["test"] - 0.1) <= tolerance


def test_too_few_groups_is_explained():
    with pytest.raises(UsageError, match="domain 'x' has 2 group"):
        assign([("a", "x", 1), ("b", "x", 1), ("b", "x", 1)])
    books = [Document(text=f"t{i}", domain="x", group=group) for i, group in enumerate("aab")]
    with pytest.raises(UsageError, match=r"task\.data\.group_column: domain 'x' has 2 group"):
        split_documents(books)


def test_one_text_file_is_divided_by_position():
    text = " ".join(f"word{i}" for i in range(1000))
    parts = split_documents([Document(text=text, domain="all", group="only")])
    joined = [parts[name][0].text for name in SPLITS]
    assert "".join(joined) == text
    assert [round(len(part) / len(text), 2) for part in joined] == [0.8, 0.1, 0.1]
    assert all(part.startswith("word") for part in joined)


@given(st.text(max_size=400))
def test_cut_parts_join_to_the_text(text):
    assert "".join(cut(text)) == text


def test_pack_no_group_is_divided(pack):
    splits_of = defaultdict(set)
    for name, documents in pack.items():
        for document in documents:
            splits_of[document.group].add(name)
    assert all(len(splits) == 1 for splits in splits_of.values())
    assert sum(len(documents) for documents in pack.values()) == len(load_documents(TextDataConfig()))


def test_pack_shares(pack):
    size = Counter()
    for name, documents in pack.items():
        for document in documents:
            size[document.domain, name] += len(document.text.encode())
    for domain in {domain for domain, _ in size}:
        total = sum(size[domain, name] for name in SPLITS)
        # Novels are seven books and drama sixteen plays, so they cannot be met better than this.
        tolerance = 0.025 if domain in ("novels", "drama") else 0.006
        for name, share in zip(SPLITS, (0.8, 0.1, 0.1), strict=True):
            assert abs(size[domain, name] / total - share) < tolerance, (domain, name)


def test_pack_every_split_has_large_and_small_documents(pack):
    # The Devil's Dictionary has small blocks and the Jargon File large ones: all splits have both.
    for documents in pack.values():
        kinds = Counter(d.group.split("-")[0] for d in documents if d.domain == "dictionary")
        assert 1 < kinds["dictionary/devil"] / kinds["dictionary/jargon"] < 3


def grams(text: str, n: int = 13) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


@pytest.mark.slow
def test_pack_test_text_is_not_in_the_training_text(pack):
    seen = set().union(*(grams(document.text) for document in pack["train"]))
    # Per cent of 13-grams. Measured: docs 0.43, scripture 0.07-0.10, dictionary 0.03, the others 0.
    limits = {
        "code": 0.7,
        "docs": 0.8,
        "speeches": 0.6,
        "scripture": 0.3,
        "dictionary": 0.1,
        "drama": 0.1,
        "novels": 0.1,
    }
    for name in ("validation", "test"):
        for domain, limit in limits.items():
            held = set().union(*(grams(d.text) for d in pack[name] if d.domain == domain))
            assert 100 * len(held & seen) / len(held) <= limit, (name, domain)
