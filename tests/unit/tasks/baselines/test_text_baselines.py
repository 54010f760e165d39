"""Baselines of the tasks on text equal a slow count over dictionaries, for bytes and for subwords, and file sizes."""

import bz2
import gzip
import json
import lzma
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.prepared_text import prepare_folder
from support.training_cases import tiny_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moebench.errors import UsageError
from moebench.tasks.baselines import stored_text
from moebench.tasks.baselines.baseline import TrivialBaseline
from moebench.tasks.baselines.span_corruption import compute_sentinel_nats, restore_text
from moebench.tasks.language import TextTask
from moebench.tasks.text.embedded_tokenizer import BPE
from moebench.tasks.text.sources import load_documents
from moebench.tasks.text.splits import split_documents
from moebench.training.model import prepare_task

SEPARATOR = 256
Symbols = Sequence[int]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three domains of twelve documents of words drawn from a few, some with letters of two bytes."""
    draw = np.random.default_rng(0)
    words = ["the ", "then ", "tree ", "né ", "ann ", "\n"]
    rows = [
        {"text": "".join(draw.choice(words, 60)) + f"{name}{i}", "domain": name} for i in range(12) for name in "abc"
    ]
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


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


def make_task(text: Path, folder: Path, name: str, **options: Any) -> TextTask:
    data = {"tokenizer": "bytes", **options.pop("data", {})}
    config = tiny_config(text, task={"name": name, "sequence_length": 24, "eval_windows": 3, **options, "data": data})
    task = prepare_task(config, folder)
    assert isinstance(task, TextTask)
    return task


def count(texts: Sequence[Symbols], order: int) -> dict[tuple[int, ...], Counter[int]]:
    """Return the context of `order - 1` symbols -> counts of the next symbol."""
    counts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for symbols in texts:
        for end in range(order - 1, len(symbols)):
            counts[tuple(symbols[end - order + 1 : end])][symbols[end]] += 1
    return counts


def predict(tables: Sequence[dict[tuple[int, ...], Counter[int]]], before: Symbols, symbol: int, size: int) -> float:
    """Return the interpolated probability of a symbol after the given ones; `tables`: orders 1, 2, ..."""
    p = 1 / size
    for order, table in enumerate(tables, 1):
        seen = table.get(tuple(before[len(before) - order + 1 :]) if order > 1 else ())
        if order - 1 <= len(before) and seen:
            p = (seen[symbol] + len(seen) * p) / (seen.total() + len(seen))
    return p


def by_name(baselines: Sequence[TrivialBaseline]) -> dict[str, TrivialBaseline]:
    return {baseline.name: baseline for baseline in baselines}


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
    assert [block.tolist() for block in blocks] == [
        task.text.train.tokens_N[start : start + 100].tolist() for start in starts
    ]
    everything = np.concatenate(stored_text.read_training_tokens(task, 10**9))
    assert (everything == task.text.train.tokens_N).all()


def test_masked_tokens_are_predicted_from_visible_ones(text: Path, tmp_path: Path) -> None:
    task: Any = make_task(text, tmp_path, "masked_language", rate=0.3)
    train = task.text.train.tokens_N.tolist()
    left = [count([train], order) for order in (1, 2, 3)]
    around = [count([train], 1), count([train], 2), defaultdict(Counter)]
    for before, token, after in zip(train, train[1:], train[2:], strict=False):
        around[2][before, after][token] += 1
    nats, weight = {"order-3 n-gram": 0.0, "order-3 two-sided n-gram": 0.0}, 0
    for batch in task.eval_batches("test", 4):
        for row in range(len(batch.domain_B)):
            shown, target = batch.input_BL[row].tolist(), batch.target_BP[row].tolist()
            for position in range(len(shown)):
                if not batch.count_BP[row, position]:
                    continue
                weight += int(batch.weight_BP[row, position])
                before: list[int] = []
                while len(before) < position and len(before) < 2 and shown[position - len(before) - 1] != task.mask_id:
                    before.insert(0, shown[position - len(before) - 1])
                p = {"order-3 n-gram": predict(left, before, target[position], 257)}
                tables = around[: 1 + len(before[:1])]
                value = predict(tables, before, target[position], 257)
                if before and position + 1 < len(shown) and shown[position + 1] != task.mask_id:
                    seen = around[2].get((before[-1], shown[position + 1]))
                    if seen:
                        value = (seen[target[position]] + len(seen) * value) / (seen.total() + len(seen))
                p["order-3 two-sided n-gram"] = value
                for name, probability in p.items():
                    if shown[position] != task.mask_id:
                        probability = 0.5 * (shown[position] == target[position]) + 0.5 * probability
                    nats[name] -= math.log(probability)
    baselines = by_name(task.compute_baselines("test"))
    for name, total in nats.items():
        value = baselines[name].values["masked_bits_per_byte"]
        assert value == pytest.approx(total / math.log(2) / weight, rel=1e-9)
    assert baselines["order-3 two-sided n-gram"].is_reference


def test_removed_spans_are_predicted_from_the_text_before(text: Path, tmp_path: Path) -> None:
    task: Any = make_task(text, tmp_path, "span_corruption", noise_density=0.25, mean_span=2.0)
    train = task.text.train.tokens_N.tolist()
    tables = [count([train], order) for order in (1, 2, 3)]
    num_noise, num_spans = task.config.num_noise, task.config.num_spans
    assert (num_noise, num_spans) == (6, 3)
    nats, weight = 0.0, 0
    for batch in task.eval_batches("test", 4):
        weight += int(batch.weight_BP.sum())
        for encoder, target in zip(batch.input_BL.tolist(), batch.target_BP.tolist(), strict=True):
            window: list[int] = []
            for token in encoder:
                if token < task.first_sentinel:
                    window.append(token)
                    continue
                at = target.index(token) + 1
                while target[at] < task.first_sentinel:
                    nats -= math.log(predict(tables, window, target[at], 257))
                    window.append(target[at])
                    at += 1
            # 6 tokens fall into 3 non-empty spans in C(5, 2) = 10 equally likely ways
            nats += math.log(10)
    values = by_name(task.compute_baselines("test"))["order-3 n-gram"].values
    assert values["span_bits_per_byte"] == pytest.approx(nats / math.log(2) / weight, rel=1e-9)


def test_the_text_of_a_window_is_restored(text: Path, tmp_path: Path) -> None:
    task: Any = make_task(text, tmp_path, "span_corruption")
    language = make_task(text, tmp_path, "language")
    for corrupted, plain in zip(task.eval_batches("test", 4), language.eval_batches("test", 4), strict=True):
        token_BL, is_removed_BL = restore_text(corrupted, task.first_sentinel, task.start_id)
        assert torch.equal(torch.from_numpy(token_BL), plain.target_BP)
        assert (is_removed_BL.sum(1) == task.config.num_noise).all()


def test_every_division_into_spans_costs_the_same() -> None:
    # 4 removed tokens in 2 spans: x t y t t t z, x t t y t t z, x t t t y t z; each 1/3
    patterns = np.array([list("x.x...x"), list("x..x..x"), list("x...x.x")]) == "x"
    assert compute_sentinel_nats(patterns) == pytest.approx(np.full(3, math.log(3)))
