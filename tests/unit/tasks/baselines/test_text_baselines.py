"""Baselines of language equal a slow count over dictionaries, for bytes and for subwords, and file sizes."""

import bz2
import gzip
import json
import lzma
import math
from pathlib import Path

import numpy as np
import pytest
from support.prepared_text import prepare_folder
from support.slow_ngrams import Symbols, by_name, count, make_task, predict, write_domains
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moebench.errors import UsageError
from moebench.tasks.baselines import stored_text
from moebench.tasks.language import TextTask
from moebench.tasks.text.embedded_tokenizer import BPE
from moebench.tasks.text.sources import load_documents
from moebench.tasks.text.splits import split_documents

SEPARATOR = 256


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_domains(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def subwords(text: Path) -> Tokenizer:
    """A byte-level tokenizer of 300 tokens, whose file is beside the text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False
    )
    tokenizer.train_from_iterator([json.loads(line)["text"] for line in text.read_text().splitlines()], trainer)
    tokenizer.save(str(text.parent / "tokenizer.json"))
    return tokenizer


@pytest.mark.parametrize("split", ["test", "validation"])
@pytest.mark.parametrize("is_subword", [False, True])
def test_byte_ngrams_equal_a_slow_count(
    text: Path, subwords: Tokenizer, tmp_path: Path, split: str, is_subword: bool
) -> None:
    options = {"data": {"tokenizer": str(text.parent)}} if is_subword else {}
    task = make_task(text, tmp_path, "language", **options)
    check_byte_ngrams(task, split, subwords if is_subword else None)


def check_byte_ngrams(task: TextTask, split: str, tokenizer: Tokenizer | None) -> None:
    """Compare n-grams with a slow count, over the bytes of byte-level tokens; None: tokens are bytes."""

    def to_bytes(token: int) -> Symbols:
        if tokenizer is None:
            return [token]
        piece = tokenizer.id_to_token(token)
        is_separator = piece in ("<eos>", "<|endoftext|>")
        return [SEPARATOR] if is_separator else [BYTE_CHARACTERS.index(character) for character in piece]

    train = [symbol for token in task.text.train.tokens_N.tolist() for symbol in to_bytes(token)]
    tables = [count([train], order) for order in range(1, 6)]
    bits: dict[int, list[float]] = {order: [0.0, 0.0, 0.0] for order in range(1, 6)}
    num_bytes = [0, 0, 0]
    for batch in task.eval_batches(split, 2):
        for row, domain in enumerate(batch.domain_B.tolist()):
            symbols = list(to_bytes(int(batch.input_BL[row, 0])))
            num_bytes[domain] += int(batch.weight_BP[row].sum())
            for token in batch.target_BP[row].tolist():
                for symbol in to_bytes(token):
                    for order in bits:
                        bits[order][domain] -= math.log2(predict(tables[:order], symbols, symbol, 257))
                    symbols.append(symbol)
    baselines = by_name(task.compute_baselines(split))
    for order, bits_D in bits.items():
        values = baselines[f"order-{order} n-gram"].values
        assert values["bits_per_byte"] == pytest.approx(sum(bits_D) / sum(num_bytes), rel=1e-9)
        for domain in range(3):
            by_hand = bits_D[domain] / num_bytes[domain]
            assert values[f"bits_per_byte/{'abc'[domain]}"] == pytest.approx(by_hand, rel=1e-9)
    assert [name for name, baseline in baselines.items() if baseline.is_reference] == ["order-3 n-gram"]


@pytest.fixture(scope="module")
def prepared(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of several shards of the text, with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("prepared") / "tokens"
    options = {"tokenizer": "train:280", "shard_bytes": 1500, "validation": 0.3, "test": 0.3}
    manifest = prepare_folder(text, folder, **options).manifest
    assert len(manifest.shards) > 2
    return folder


@pytest.mark.parametrize("split", ["test", "validation"])
def test_byte_ngrams_of_a_prepared_folder_equal_a_slow_count(prepared: Path, tmp_path: Path, split: str) -> None:
    task = make_task(prepared, tmp_path, "language", data={"tokenizer": BPE})
    check_byte_ngrams(task, split, Tokenizer.from_file(str(prepared / "tokenizer.json")))


def test_all_baselines_of_a_prepared_folder_are_those_of_one_shard(text: Path, prepared: Path, tmp_path: Path) -> None:
    options = {"tokenizer": "train:280", "validation": 0.3, "test": 0.3, "shard_bytes": 1 << 20}
    assert len(prepare_folder(text, tmp_path / "one", **options).manifest.shards) == 1
    for name in ("language", "masked_language", "span_corruption"):
        tasks = [make_task(path, tmp_path, name, data={"tokenizer": BPE}) for path in (prepared, tmp_path / "one")]
        many, one = (task.compute_baselines("test") for task in tasks)
        assert many
        assert many == one


def test_a_prepared_training_split_is_sampled_evenly(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(prepared, tmp_path, "language", data={"tokenizer": BPE})
    monkeypatch.setattr(stored_text, "BLOCK", 100)
    train_N = task.text.train.tokens_N
    starts = [index * -(-len(train_N) // 100) // 3 * 100 for index in range(3)]
    blocks = stored_text.read_training_tokens(task, 350)
    assert [block.tolist() for block in blocks] == [train_N[start : start + 100].tolist() for start in starts]
    assert (np.concatenate(stored_text.read_training_tokens(task, 10**9)) == train_N).all()


def test_ids_outside_the_vocabulary_of_a_prepared_folder_are_one_line(prepared: Path, tmp_path: Path) -> None:
    task = make_task(prepared, tmp_path, "language", data={"tokenizer": BPE})
    task.text.train.tokens.parts[-1] = np.full_like(task.text.train.tokens.parts[-1], 65535)
    with pytest.raises(UsageError, match=f"have the id 65535, and its vocabulary ends at {task.text.vocab_size - 1}"):
        stored_text.read_training_tokens(task, 10**9)


def _list_byte_characters() -> list[str]:
    """Return the character that byte-level vocabularies write for each byte, after OpenAI's `bytes_to_unicode`."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    characters, number = [], 0
    for value in range(256):
        characters.append(chr(value) if value in printable else chr(256 + number))
        number += value not in printable
    return characters


BYTE_CHARACTERS = _list_byte_characters()


@pytest.mark.parametrize("is_subword", [False, True])
def test_compressors_equal_the_sizes_of_files(
    text: Path, subwords: Tokenizer, tmp_path: Path, is_subword: bool
) -> None:
    options = {"data": {"tokenizer": str(text.parent)}} if is_subword else {}
    task = make_task(text, tmp_path, "language", **options)
    documents = split_documents(load_documents(task.config.data))["test"]
    texts = ["".join(d.text for d in documents if d.domain == name).encode() for name in "abc"]
    weight_D = [0, 0, 0]
    for batch in task.eval_batches("test", 100):
        for domain, weight in zip(batch.domain_B.tolist(), batch.weight_BP.sum(1).tolist(), strict=True):
            weight_D[domain] += weight
    sizes = {
        "gzip -9": [len(gzip.compress(document, compresslevel=9)) for document in texts],
        "bz2 -9": [len(bz2.compress(document)) for document in texts],
        "xz -9e": [len(lzma.compress(document, preset=9 | lzma.PRESET_EXTREME)) for document in texts],
    }
    baselines = by_name(task.compute_baselines("test"))
    for name, sizes_D in sizes.items():
        bits_D = [8 * size / len(document) for size, document in zip(sizes_D, texts, strict=True)]
        mean = sum(bits * weight for bits, weight in zip(bits_D, weight_D, strict=True)) / sum(weight_D)
        assert baselines[name].values["bits_per_byte"] == pytest.approx(mean, rel=1e-9)
        assert baselines[name].values["bits_per_byte/b"] == pytest.approx(bits_D[1], rel=1e-9)


def test_held_out_domains_are_apart(text: Path, tmp_path: Path) -> None:
    task = make_task(text, tmp_path, "language", data={"held_out_domains": ["b"]})
    values = by_name(task.compute_baselines("test"))["order-3 n-gram"].values
    assert values["bits_per_byte/out_of_domain"] == pytest.approx(values["bits_per_byte/b"], rel=1e-12)
    inside = (values["bits_per_byte/a"] + values["bits_per_byte/c"]) / 2
    assert values["bits_per_byte"] == pytest.approx(inside, rel=0.01)  # windows of 24 tokens have nearly equal bytes
    assert "bits_per_byte/b" not in by_name(task.compute_baselines("validation"))["gzip -9"].values


def test_a_long_training_split_is_sampled_evenly(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(text, tmp_path, "language")
    monkeypatch.setattr(stored_text, "BLOCK", 100)
    blocks = stored_text.read_training_tokens(task, 350)
    num_blocks = -(-len(task.text.train.tokens_N) // 100)
    starts = [index * num_blocks // 3 * 100 for index in range(3)]
    sampled = f"counts of {3 / num_blocks:.0%} of the training split, in evenly spaced blocks"
    assert stored_text.describe_counts(task, 350) == sampled
    assert stored_text.describe_counts(task, 10**9) == "counts of the training split"
    assert [block.tolist() for block in blocks] == [
        task.text.train.tokens_N[start : start + 100].tolist() for start in starts
    ]
    everything = np.concatenate(stored_text.read_training_tokens(task, 10**9))
    assert (everything == task.text.train.tokens_N).all()
