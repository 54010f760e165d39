import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from support.prepared_text import folder_content, options_for, prepare_folder, read_blocks, write_mixed
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from moebench.errors import UsageError
from moebench.tasks.text.prepared import build, source
from moebench.tasks.text.prepared.checks import check_prepared
from moebench.tasks.text.prepared.folder_state import lock_folder
from moebench.tasks.text.prepared.manifest import read_manifest
from moebench.tasks.text.prepared.options import PrepareOptions, describe_source
from moebench.tasks.text.prepared.reader import open_prepared
from moebench.tasks.text.sources import TextDataConfig
from moebench.tasks.text.tokens import load_tokenizer


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    return write_mixed(tmp_path_factory.mktemp("source") / "mixed")


def word_level(path: Path) -> str:
    """Write a tokenizer whose pieces are not the bytes of the text: words, spaces and characters, with offsets."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    from support.prepared_text import WORDS

    tokenizer.train_from_iterator(
        [" ".join(WORDS)] * 3, trainers.BpeTrainer(vocab_size=90, show_progress=False, special_tokens=["</s>"])
    )
    tokenizer.save(str(path))
    return str(path)


@pytest.mark.parametrize("name", ["bytes", "bpe4096", "train:300", "words"])
def test_streams_equal_documents_encoded_one_by_one(mixed, tmp_path, name):
    # Oracle: each document by the library's plain `encode`, after a separator, in the order of the source.
    name = word_level(tmp_path / "words.json") if name == "words" else name
    options = options_for(mixed, tmp_path / "out", tokenizer=name)
    manifest = prepare_folder(mixed, tmp_path / "out", tokenizer=name).manifest
    assert len(manifest.shards) > 3
    tokenizer = load_tokenizer(name if name == "bytes" else str(tmp_path / "out" / "tokenizer.json"))
    expected: dict[tuple[str, str], list[int]] = defaultdict(list)
    num_bytes = 0
    for block in read_blocks(options):
        token_N, count_N = tokenizer.encode(block.text)
        assert block.is_start
        expected[block.split, block.domain] += [tokenizer.separator, *token_N.tolist()]
        num_bytes += len(block.text.encode())
        assert count_N.sum() == len(block.text.encode())
    text = open_prepared(TextDataConfig(path=str(tmp_path / "out")), tmp_path / "cache", 8)
    assert text.domains == ("notes", "x", "y")
    total = 0
    for split_name in ("train", "validation", "test"):
        split = getattr(text, split_name)
        stream = [token for domain in text.domains for token in expected[split_name, domain]]
        assert split.tokens_N.tolist() == stream
        total += int(
            split.bytes[split.tokens_N].sum()
            if isinstance(split.bytes, np.ndarray)
            else sum(int(part.sum()) for part in split.bytes.parts)
        )
    assert total == num_bytes == sum(s.num_bytes for shard in manifest.shards for s in shard.segments)
    train = [token for domain in text.domains for token in expected["train", domain]]
    assert text.token_count_V.tolist() == np.bincount(train, minlength=text.vocab_size).tolist()
    assert isinstance(text.train.bytes, np.ndarray) is ("words" not in name)
    assert list(check_prepared(tmp_path / "out")) == []


def test_the_number_of_workers_and_the_folder_change_nothing(mixed, tmp_path):
    contents = []
    for workers in (1, 2, 5):
        prepare_folder(mixed, tmp_path / f"{workers}", tokenizer="train:280", workers=workers)
        contents.append(folder_content(tmp_path / f"{workers}"))
    assert contents[0] == contents[1] == contents[2]


class StoppedError(Exception):
    """In place of a kill."""


@pytest.mark.parametrize(
    "stop_at", [pytest.param(number, marks=() if number in (0, 3, 7) else pytest.mark.slow) for number in range(0, 8)]
)
def test_a_stopped_call_continues_and_ends_with_the_same_files(mixed, tmp_path, monkeypatch, stop_at):
    prepare_folder(mixed, tmp_path / "whole", tokenizer="train:280")
    written, write = [], build.write_file

    def write_or_stop(folder, name, contents):
        if len(written) == stop_at:
            (folder / f"{name}.unfinished").write_bytes(b"half")
            raise StoppedError
        written.append(name)
        return write(folder, name, contents)

    with monkeypatch.context() as patch:
        for module in ("build", "shards", "folder_state"):
            patch.setattr(f"moebench.tasks.text.prepared.{module}.write_file", write_or_stop)
        with pytest.raises(StoppedError):
            prepare_folder(mixed, tmp_path / "out", tokenizer="train:280")
    outcome = prepare_folder(mixed, tmp_path / "out", tokenizer="train:280", workers=2)
    assert outcome.num_kept == sum(name.startswith("shard-") for name in written)
    assert folder_content(tmp_path / "out") == folder_content(tmp_path / "whole")
    assert prepare_folder(mixed, tmp_path / "out", tokenizer="train:280").was_ready


def test_another_source_or_option_is_refused_in_one_line(mixed, tmp_path):
    prepare_folder(mixed, tmp_path / "out")
    with pytest.raises(UsageError, match=r"was begun with another validation \(0\.2, now 0\.1\); remove it"):
        prepare_folder(mixed, tmp_path / "out", validation=0.1)
    other = write_mixed(tmp_path / "other", number=90)
    with pytest.raises(UsageError, match="was begun with other files, or files that were changed"):
        prepare_folder(other, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    with pytest.raises(UsageError, match=r"'.*full' is not empty"):
        prepare_folder(mixed, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]


def test_a_tokenizer_that_loses_text_is_refused_and_leaves_nothing(mixed, tmp_path):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.train_from_iterator(["abc def"], trainers.BpeTrainer(show_progress=False, vocab_size=30))
    tokenizer.save(str(tmp_path / "lossy.json"))
    with pytest.raises(UsageError, match=r"task\.data\.tokenizer: '.*lossy\.json' keeps .* % of the bytes of domain"):
        prepare_folder(mixed, tmp_path / "out", tokenizer=str(tmp_path / "lossy.json"))
    assert not (tmp_path / "out").exists()


def test_groups_files_and_equal_texts_stay_together(tmp_path):
    rows = [{"text": f"text {n // 2}", "author": f"author {n % 7}"} for n in range(200)]
    for part in range(10):
        (tmp_path / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows[part * 20 : part * 20 + 20])))

    def splits_by(key, **changes):
        result = defaultdict(set)
        blocks = read_blocks(options_for(tmp_path, tmp_path / "out", **changes))
        for number, block in enumerate(blocks):
            result[key(number, block)].add(block.split)
        assert len({split for splits in result.values() for split in splits}) == 3 or len(result) < 11
        return result

    assert all(len(splits) == 1 for splits in splits_by(lambda n, block: block.text).values())
    by_author = splits_by(lambda n, block: rows[n]["author"], group_column="author")
    assert all(len(splits) == 1 for splits in by_author.values())
    assert all(len(splits) == 1 for splits in splits_by(lambda n, block: n // 20, split_by="file").values())


def test_splits_of_the_source_are_kept_and_missing_ones_are_taken_from_train(tmp_path):
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        rows = [{"text": f"{part} {number}"} for number in range(100)]
        (tmp_path / part / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    blocks = read_blocks(options_for(tmp_path, tmp_path / "out"))
    assert {block.text.split()[0] for block in blocks if block.split == "test"} == {"test"}
    assert {block.text.split()[0] for block in blocks if block.split == "validation"} == {"train"}
    assert sum(block.split == "test" for block in blocks) == 100


def test_a_long_text_is_cut_without_separators_and_a_single_file_is_divided(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "BLOCK", 64)
    monkeypatch.setattr(source, "SMALL_BLOCK", 32)
    (tmp_path / "two").mkdir()
    for name in "ab":
        (tmp_path / "two" / f"{name}.txt").write_text(f"\n \n{name} word\n" * 40)
    blocks = read_blocks(options_for(tmp_path / "two", tmp_path / "out"))
    assert [block.is_start for block in blocks].count(True) == 2
    assert len(blocks) > 10
    assert len({block.split for block in blocks if block.domain == "a"}) == 1
    single = read_blocks(options_for(tmp_path / "two" / "a.txt", tmp_path / "out"))
    assert all(block.is_start for block in single)
    assert len({block.text for block in single}) > 1


def test_files_of_patterns_are_those_named(mixed, tmp_path):
    names = [f.name for f in source.open_source(options_for(f"{mixed}/*.jsonl*", tmp_path / "out")).files]
    assert names == ["a.jsonl", "b.jsonl.gz"]
    with pytest.raises(UsageError, match="no file matches"):
        source.open_source(options_for(f"{mixed}/*.nothing", tmp_path / "out"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "train:100"}, r"--tokenizer must be train:VOCAB with VOCAB from 257 to"),
        ({"tokenizer": "train:x"}, r"--tokenizer must be train:VOCAB"),
        ({"split_by": "word"}, "--split-by must be one of document, file, block, got word"),
        ({"validation": 0.6, "test": 0.5}, "--validation and --test must be below 1"),
        ({"test": float("nan")}, "--test must be between 0 and 1"),
        ({"workers": 0}, "--workers must be at least 1"),
        ({"split_by": "file", "group_column": "author"}, "--split-by file: --group-column divides by group"),
    ],
)
def test_wrong_options_are_one_line(tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        options_for(tmp_path, tmp_path / "out", **changes)


def test_a_source_without_a_split_is_one_line_and_leaves_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "only one"}))
    with pytest.raises(UsageError, match=r"DATA: the .* split has no documents"):
        prepare_folder(tmp_path / "a.jsonl", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "b.jsonl").write_text('{"text": "fine"}\n{"txt": 1}')
    with pytest.raises(UsageError, match=r"task\.data\.text_column: there is no column 'text' in b\.jsonl, row 1"):
        prepare_folder(tmp_path / "b.jsonl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_data_set_of_the_hub_is_streamed(hub, tmp_path):
    rows = [{"text": f"text {number} " * 9, "domain": "xy"[number % 2]} for number in range(60)]
    (hub / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = {"text_column": "text", "domain_column": "domain", "group_column": None}
    data = describe_source([], {"dataset": "on/hub", "config": None, "split": "train", "revision": None}, columns)
    options = PrepareOptions(
        sources=(), out=tmp_path / "out", tokenizer="bytes", data=data, validation=0.2, test=0.2, shard_bytes=900
    )
    manifest = build.build_folder(options, lambda stage, progress: None).manifest
    assert manifest.domains == ("x", "y")
    assert sum(s.num_bytes for shard in manifest.shards for s in shard.segments) == sum(len(r["text"]) for r in rows)


def test_two_calls_at_once_are_refused(mixed, tmp_path):
    with (
        lock_folder(tmp_path / "out"),
        pytest.raises(UsageError, match=r"'.*out' is being prepared by another process"),
    ):
        prepare_folder(mixed, tmp_path / "out")


def test_the_manifest_says_what_was_made(mixed, tmp_path):
    prepare_folder(mixed, tmp_path / "out", tokenizer="train:280")
    manifest = read_manifest(tmp_path / "out")
    assert manifest.options["tokenizer"] == "train:280"
    assert manifest.source["files"] == 34
    assert manifest.source["bytes"] == sum(path.stat().st_size for path in mixed.rglob("*") if path.is_file())
    assert manifest.tokenizer is not None
    assert load_tokenizer(str(tmp_path / "out" / "tokenizer.json")).vocab_size == manifest.vocab_size == 280
