import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.prepared_text import prepare_folder, write_mixed

from moebench.errors import UsageError
from moebench.tasks.language import Language
from moebench.tasks.masked_language import MaskedLanguage
from moebench.tasks.span_corruption import SpanCorruption
from moebench.tasks.text.prepared.checks import check_prepared
from moebench.tasks.text.prepared.manifest import read_manifest
from moebench.tasks.text.prepared.reader import is_prepared, open_prepared, read_digest
from moebench.tasks.text.sources import TextDataConfig


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    source = write_mixed(tmp_path_factory.mktemp("source") / "mixed")
    out = tmp_path_factory.mktemp("prepared") / "out"
    prepare_folder(source, out, tokenizer="train:300", shard_bytes=1500)
    return out


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """Return a copy with its times, as `cp -a` makes it."""
    return Path(shutil.copytree(original, tmp_path / "tokens", copy_function=shutil.copy2))


def rewrite(folder: Path, change: Any) -> None:
    """Change the manifest, with a right checksum of its own and a right digest, as somebody who means harm would."""
    values = json.loads((folder / "manifest.json").read_text())
    change(values)
    values.pop("checksum")
    values["checksum"] = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(values))


def open_folder(folder: Path, **options: Any) -> Any:
    return open_prepared(TextDataConfig(path=str(folder), **options), folder.parent / "cache", 8)


@pytest.mark.parametrize("task", [Language, MaskedLanguage, SpanCorruption])
def test_every_text_task_reads_it(folder, tmp_path, task):
    config = task.Config(sequence_length=16, eval_windows=3, data=TextDataConfig(path=str(folder)))
    prepared = task.prepare(config, tmp_path / "cache")
    assert task.source_digest(config) == prepared.digest == read_digest(config.data)
    together = prepared.train_batch(6, seed=1, step=3)
    parts = [prepared.train_batch(6, 1, 3, part) for part in (slice(0, 3), slice(3, 6))]
    assert torch.equal(torch.cat([part.input_BL for part in parts]), together.input_BL)
    assert len(prepared.list_train_samples(6, 1, 3)) == 6
    for split in ("validation", "test"):
        batches = prepared.eval_batches(split, 4)
        assert all(int(batch.weight_BP.sum()) > 0 for batch in batches)
    assert int(prepared.token_pairs().sum()) == len(prepared.text.train.tokens) - 1


def test_one_epoch_reads_every_window_once(folder, tmp_path):
    text = open_folder(folder)
    num_windows = text.train.num_windows
    seen = text.train.order(num_windows, 3, 0, np.arange(num_windows))
    assert sorted(seen.tolist()) == list(range(num_windows))


def test_held_out_domains_are_in_the_test_split_alone(folder):
    text, complete = open_folder(folder, held_out_domains=["x"]), open_folder(folder)
    assert (text.domains, text.num_held_out) == (("notes", "y", "x"), 1)
    assert len(text.train.length_D) == len(text.validation.length_D) == 2
    assert text.test.length_D.tolist() == complete.test.length_D[[0, 2, 1]].tolist()
    x = complete.domains.index("x")
    count_V = np.bincount(complete.train.tokens_N[:0], minlength=300)
    first = complete.train.length_D.cumsum()[x] - complete.train.length_D[x]
    x_N = complete.train.tokens_N[first : first + complete.train.length_D[x]]
    count_V = complete.token_count_V - np.bincount(x_N, minlength=300)
    assert text.token_count_V.tolist() == count_V.tolist()
    assert text.digest != complete.digest
    with pytest.raises(UsageError, match=r"held_out_domains: 'z' is unknown"):
        open_folder(folder, held_out_domains=["z"])


def test_the_text_of_windows_can_be_read_back(folder):
    text = open_folder(folder)
    token_BM, byte_BM = text.validation.window(np.arange(text.validation.num_windows))
    for token_M, byte_M in zip(token_BM, byte_BM, strict=True):
        assert len(text.tokenizer.decode_bytes(token_M)) == byte_M.sum()


def test_options_that_the_folder_fixes_are_refused(folder):
    for options in ({"tokenizer": "x.json"}, {"text_column": "body"}, {"max_bytes": 5}, {"group_column": "a"}):
        (name,) = options
        with pytest.raises(UsageError, match=rf"task\.data\.{name}: .* is a prepared folder, where it is fixed"):
            open_folder(folder, **options)


def test_the_options_of_prepare_are_no_others(folder):
    for options in ({"tokenizer": "train:300"}, {"remove_overlap": True}, {"mask_documents": True}):
        assert open_folder(folder, **options).digest == open_folder(folder).digest


def test_an_unfinished_folder_is_named(folder):
    (folder / "manifest.json").unlink()
    with pytest.raises(UsageError, match=f"prepared folder '{folder}' is not finished; the `moebench prepare` that"):
        read_manifest(folder)
    with pytest.raises(UsageError, match="is not finished; the `moebench prepare` that began it continues"):
        is_prepared(TextDataConfig(path=str(folder)))


def test_a_copy_without_times_is_accepted_after_verify(folder):
    os.utime(folder / "manifest.json", (1, 1))
    with pytest.raises(UsageError, match=r"is newer than manifest\.json: .*`moebench verify .*` checks it"):
        open_folder(folder)
    assert list(check_prepared(folder)) == []
    assert open_folder(folder).train.num_windows


def test_every_damaged_byte_is_found(folder):
    names = [path.name for path in folder.glob("*.bin")] + ["tokenizer.json"]
    for name in names:
        content = (folder / name).read_bytes()
        changed = bytearray(content)
        changed[len(content) // 2] ^= 1
        (folder / name).write_bytes(changed)
        problems = list(check_prepared(folder))
        assert [problem.split()[0] for problem in problems] == [name]
        (folder / name).write_bytes(content)
    assert list(check_prepared(folder)) == []


def test_a_folder_that_cannot_be_written_is_checked(folder, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", refuse)
    assert list(check_prepared(folder)) == []


def test_a_file_of_another_size_or_none_is_one_line(folder):
    with (folder / "tokens-00000.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UsageError, match=r"tokens-00000\.bin has [\d,]+ bytes, not [\d,]+"):
        open_folder(folder)
    (folder / "tokens-00000.bin").unlink()
    with pytest.raises(UsageError, match=r"tokens-00000\.bin cannot be read \("):
        open_folder(folder)
    assert any("tokens-00000.bin cannot be read" in problem for problem in check_prepared(folder))


def test_links_and_pipes_are_not_read(folder):
    (folder / "tokens-00000.bin").rename(folder.parent / "elsewhere")
    (folder / "tokens-00000.bin").symlink_to(folder.parent / "elsewhere")
    with pytest.raises(UsageError, match=r"tokens-00000\.bin cannot be read \("):
        open_folder(folder)
    (folder / "tokens-00000.bin").unlink()
    os.mkfifo(folder / "tokens-00000.bin")
    with pytest.raises(UsageError, match=r"tokens-00000\.bin cannot be read \("):
        open_folder(folder)


def set_huge_vocabulary(values: dict[str, Any]) -> None:
    values["vocab_size"] = 1 << 40


def set_huge_segment(values: dict[str, Any]) -> None:
    values["shards"][0]["segments"][0]["num_tokens"] = 1 << 50


def set_negative_segment(values: dict[str, Any]) -> None:
    values["shards"][0]["segments"][0]["num_tokens"] *= -1


def set_domain_of_another_type(values: dict[str, Any]) -> None:
    values["shards"][0]["segments"][0]["domain"] = ["x"]


def set_other_split(values: dict[str, Any]) -> None:
    values["shards"][0]["segments"][0]["split"] = "../../etc"


def drop_shards(values: dict[str, Any]) -> None:
    del values["shards"]


def set_overlap_of_more_than_all(values: dict[str, Any]) -> None:
    values["source"]["overlap"] = {"x": [3, 2]}


def set_overlap_of_another_type(values: dict[str, Any]) -> None:
    values["source"]["overlap"] = {"x": ["\x1b[31m", 2]}


def set_shards_of_another_type(values: dict[str, Any]) -> None:
    values["shards"] = {"a": 1}


@pytest.mark.parametrize(
    "change",
    [
        set_huge_vocabulary,
        set_huge_segment,
        set_negative_segment,
        set_domain_of_another_type,
        set_other_split,
        drop_shards,
        set_shards_of_another_type,
        set_overlap_of_more_than_all,
        set_overlap_of_another_type,
        lambda values: values.update(format="other"),
        lambda values: values.update(separator=None),
        lambda values: values["counts"].update(size="large"),
        lambda values: values.update(digest="0"),
    ],
)
def test_a_hostile_manifest_is_one_line(folder, change):
    rewrite(folder, change)
    with pytest.raises(UsageError, match=r"prepared folder '.*': manifest\.json is not valid \(") as caught:
        read_manifest(folder)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("content", [b"", b"[", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"format": 1}'])
def test_what_is_no_manifest_is_one_line(folder, content):
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"manifest\.json is not valid \("):
        read_manifest(folder)


def test_ids_outside_the_vocabulary_are_one_line(folder):
    size = (folder / "tokens-00000.bin").stat().st_size
    times = (folder / "tokens-00000.bin").stat()
    (folder / "tokens-00000.bin").write_bytes(b"\xff" * size)
    os.utime(folder / "tokens-00000.bin", ns=(times.st_atime_ns, times.st_mtime_ns))
    text = open_folder(folder)
    with pytest.raises(UsageError, match="its tokens have the id 65535, and its vocabulary ends at 299"):
        text.train.window(np.arange(text.train.num_windows))
