import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, trainers

from moebench.errors import UsageError
from moebench.tasks.text.sources import TextDataConfig
from moebench.tasks.text.token_stream import TokenStream
from moebench.tasks.text.windows import (
    PreparedText,
    TextSplit,
    evaluation_windows,
    prepare,
    train_window_indices,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> TextDataConfig:
    """Two domains of ten documents; each text repeats its name, so that tokens identify their source."""
    path = tmp_path_factory.mktemp("source") / "a.jsonl"
    rows = [{"text": f"{domain}{i} " * (40 + i), "domain": domain} for i in range(10) for domain in "xyz"[:2]]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return TextDataConfig(path=str(path), tokenizer="bytes")


@pytest.fixture(scope="module")
def pack(tmp_path_factory) -> tuple[PreparedText, Path]:
    cache_dir = tmp_path_factory.mktemp("cache")
    return prepare(TextDataConfig(tokenizer="bytes"), cache_dir, 128), cache_dir


def test_pack_numbers(pack):
    prepared, _ = pack
    assert prepared.domains == ("code", "dictionary", "docs", "drama", "novels", "scripture", "speeches")
    assert prepared.vocab_size == 257
    assert prepared.train.tokens_N.dtype == np.uint16
    bytes_of = {name: getattr(prepared, name).bytes.parts[0] for name in ("train", "validation", "test")}
    assert bytes_of["train"].dtype == np.uint8
    assert isinstance(prepared.train.tokens_N.base, np.memmap)
    assert prepared.token_count_V.sum() == len(prepared.train.tokens_N)
    splits = (prepared.train, prepared.validation, prepared.test)
    assert sum(int(bytes_N.sum()) for bytes_N in bytes_of.values()) == 13_718_667
    assert sum(int((split.tokens_N == 256).sum()) for split in splits) == 627


def test_second_call_uses_the_cache_and_does_not_import_datasets(pack, monkeypatch):
    first, cache_dir = pack
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it fails
    with pytest.raises(ImportError):
        import datasets  # noqa: F401
    assert prepare(TextDataConfig(tokenizer="bytes"), cache_dir, 64).digest == first.digest


def test_windows_tile_each_domain(source, tmp_path):
    prepared = prepare(source, tmp_path, 16)
    for split in (prepared.train, prepared.validation, prepared.test):
        index_W = np.arange(split.num_windows)
        start_W, domain_W = split.start_of(index_W), split.domain_of(index_W)
        tokens_BL1, bytes_BL1 = split.window(index_W)
        assert tokens_BL1.shape == bytes_BL1.shape == (split.num_windows, 17)
        assert tokens_BL1.dtype == bytes_BL1.dtype == np.int64
        # No token is predicted twice.
        predicted = (start_W[:, None] + 1 + np.arange(16)).ravel()
        assert len(np.unique(predicted)) == len(predicted)
        for domain in range(2):
            of_W = domain_W == domain
            # Within a domain each window begins with the last token of the one before.
            assert (np.diff(start_W[of_W]) == 16).all()
            letters = {chr(token) for token in tokens_BL1[of_W].ravel() if token < 256}
            assert "xy"[domain] in letters
            assert "yx"[domain] not in letters
        assert (bytes_BL1[tokens_BL1 == 256] == 0).all()
        assert (bytes_BL1[tokens_BL1 != 256] == 1).all()


def test_digest_is_of_the_tokens(source, tmp_path):
    digest = prepare(source, tmp_path / "a", 16).digest
    assert digest == prepare(source, tmp_path / "b", 8).digest
    other = TextDataConfig(path=source.path, max_bytes=2400, tokenizer="bytes")
    assert digest != prepare(other, tmp_path / "a", 16).digest


def save_tokenizer(path: Path, corpus: str, *normalizer: normalizers.Normalizer) -> str:
    """Train characters and pairs of them, without a token for what is unknown, as `Tokenizer(BPE())` does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(list(normalizer))
    tokenizer.train_from_iterator([corpus], trainers.BpeTrainer(show_progress=False, vocab_size=60))
    tokenizer.save(str(path))
    return str(path)


def two_languages(folder: Path) -> str:
    """Write two domains of ten documents of 1,201 bytes; in one of them 8 are of Greek letters."""
    texts = {"latin": "abc abd abe " * 100, "greek": "abc abd abe " * 99 + "αβγδ abc"}
    rows = [{"text": f"{text}{'abcdefghij'[i]}", "domain": name} for i in range(10) for name, text in texts.items()]
    (folder / "two.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "two.jsonl")


def test_a_tokenizer_that_loses_a_part_of_one_domain_is_refused(tmp_path):
    path = two_languages(tmp_path)
    lossy = save_tokenizer(tmp_path / "lossy.json", "abc abd abefghij")
    config = TextDataConfig(path=path, tokenizer=lossy, remove_overlap=False)
    for _ in range(2):  # nothing of it stays in the cache
        with pytest.raises(UsageError) as caught:
            prepare(config, tmp_path / "cache", 8)
        # Of 1,201 bytes each document of the domain loses four letters of two bytes: 99.33 % are left.
        before = "abd abe "
        assert str(caught.value).startswith(
            f"task.data.tokenizer: '{lossy}' keeps 99.33 % of the bytes of domain 'greek': '{before}αβγδ abca' comes"
            f" back as '{before} abca'. Allowed: at least 99.9 %"
        )
        assert "\n" not in str(caught.value)
    lossless = save_tokenizer(tmp_path / "whole.json", "abc abd abefghij αβγδ")
    prepared = prepare(TextDataConfig(path=path, tokenizer=lossless, remove_overlap=False), tmp_path / "cache", 8)
    splits = (prepared.train, prepared.validation, prepared.test)
    assert sum(int(split.bytes.parts[0].sum()) for split in splits) == 20 * 1201


def test_a_tokenizer_that_changes_case_is_refused(tmp_path):
    rows = [{"text": f"Abc abd abe{'abcdefghij'[i]} " * 20} for i in range(10)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lower = save_tokenizer(tmp_path / "lower.json", "abc abd abefghij", normalizers.Lowercase())
    with pytest.raises(UsageError, match=r"keeps 92\.31 % of the bytes of domain 'all': 'Abc abd abe"):  # 1 of 13
        prepare(TextDataConfig(path=str(tmp_path / "a.jsonl"), tokenizer=lower), tmp_path / "cache", 8)


def test_a_domain_shorter_than_a_window_is_named(source, tmp_path):
    with pytest.raises(UsageError, match=r"domain 'x' has \d+ tokens of (train|validation) text.* 5001"):
        prepare(source, tmp_path, 5000)


@given(st.integers(1, 50), st.integers(1, 20), st.integers(0, 2**31), st.integers(0, 3))
def test_one_epoch_visits_each_window_once(num_windows, batch_size, seed, epoch):
    steps = -(-num_windows * (epoch + 1) // batch_size)
    samples = np.concatenate([train_window_indices(num_windows, batch_size, seed, s) for s in range(steps)])
    visited = samples[epoch * num_windows : (epoch + 1) * num_windows]
    assert sorted(visited) == list(range(num_windows))


@given(st.integers(1, 50), st.integers(1, 20), st.integers(0, 2**31), st.integers(0, 10**6))
def test_any_step_is_made_without_the_steps_before(num_windows, batch_size, seed, step):
    alone = train_window_indices(num_windows, batch_size, seed, step)
    # The same samples in batches of one: the counter alone decides.
    singles = [train_window_indices(num_windows, 1, seed, step * batch_size + j)[0] for j in range(batch_size)]
    assert alone.tolist() == singles


def test_epochs_and_seeds_have_their_own_order():
    orders = [train_window_indices(1000, 1000, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def made_split(counts: list[int]) -> TextSplit:
    length_D = np.array(counts) + 1
    return TextSplit(tokens=TokenStream([]), bytes=TokenStream([]), length_D=length_D, sequence_length=1)


def test_evaluation_windows_by_hand():
    split = made_split([8, 3])
    assert evaluation_windows(split, 4).tolist() == [0, 2, 4, 6, 8, 9, 10]  # the second domain has only 3
    assert evaluation_windows(split, 2).tolist() == [0, 4, 8, 9]
    assert evaluation_windows(split, None).tolist() == list(range(11))
    with pytest.raises(UsageError, match="0 was given"):
        evaluation_windows(split, 0)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 50))
def test_evaluation_windows_are_distinct_and_balanced(counts, per_domain):
    split = made_split(counts)
    index = evaluation_windows(split, per_domain)
    assert len(np.unique(index)) == len(index)
    assert np.bincount(split.domain_of(index)).tolist() == [min(per_domain, count) for count in counts]
