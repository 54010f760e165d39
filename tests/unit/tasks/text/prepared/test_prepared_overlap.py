"""Evaluation documents that a prepared folder leaves out, because its training text has them."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from support.prepared_text import folder_content, options_for, prepare_folder

from moebench.errors import UsageError
from moebench.tasks.text.overlap import remove_overlap
from moebench.tasks.text.prepared import build
from moebench.tasks.text.prepared.reader import open_prepared
from moebench.tasks.text.sources import TextDataConfig, load_documents
from moebench.tasks.text.splits import split_documents
from moebench.tasks.text.windows import prepare


def draw_text(draw: random.Random, num_words: int) -> str:
    return " ".join(f"w{draw.randrange(10**6)}" for _ in range(num_words))


def with_changes(text: str, every: int) -> str:
    words = text.split()
    return " ".join("changed" if i % every == every - 1 else word.upper() for i, word in enumerate(words))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files of two domains, with copies of training documents in the others, some of them changed."""
    folder, draw = tmp_path_factory.mktemp("source"), random.Random(0)
    texts: dict[str, list[str]] = {"train": [draw_text(draw, draw.randrange(5, 400)) for _ in range(40)]}
    for name in ("validation", "test"):
        fresh = [draw_text(draw, 100) for _ in range(12)]
        near = [with_changes(text, every) for text in texts["train"][:9] for every in (10, 22, 40)]
        texts[name] = [text for pair in zip(fresh, [*near, *fresh], strict=False) for text in pair]
    for name, members in texts.items():
        rows = [{"text": text, "domain": "xy"[number // 2 % 2]} for number, text in enumerate(members)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def texts_of(folder: Path, split: str) -> list[str]:
    """Return the documents of a folder of bytes, by domain."""
    text = open_prepared(TextDataConfig(path=str(folder)), folder.parent / "cache", 8)
    token_N = getattr(text, split).tokens_N.tolist()
    documents: list[list[int]] = []
    for token in token_N:
        if token == text.separator:
            documents.append([])
        else:
            documents[-1].append(token)
    return [bytes(document).decode() for document in documents]


def test_it_leaves_out_what_is_left_out_of_text_that_is_not_prepared(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    splits = split_documents(load_documents(TextDataConfig(path=str(source))))
    kept, rates = remove_overlap(splits)
    warning = capsys.readouterr().err.splitlines()[-1]
    manifest = prepare_folder(source, tmp_path / "out", workers=2).manifest
    assert capsys.readouterr().err.splitlines()[-1] == warning
    for name, documents in kept.items():
        expected = [d.text for domain in "xy" for d in documents if d.domain == domain]
        assert texts_of(tmp_path / "out", name) == expected
    assert len(kept["test"]) < len(splits["test"])
    counts = open_prepared(TextDataConfig(path=str(tmp_path / "out")), tmp_path / "cache", 8).overlap
    assert counts is not None
    assert list(counts) == ["x", "y"]
    for domain, (removed, total) in counts.items():
        assert removed == sum(rates[domain][name]["removed"] for name in ("validation", "test")) > 0
        assert total == sum(rates[domain][name]["documents"] for name in ("validation", "test"))
    assert prepare(TextDataConfig(path=str(source), tokenizer="bytes"), tmp_path / "cache", 8).overlap == counts
    assert not (tmp_path / "out" / "overlap.json").exists()
    everything = prepare_folder(source, tmp_path / "all", remove_overlap=False).manifest
    assert everything.digest != manifest.digest
    assert everything.overlap is None
    assert len(texts_of(tmp_path / "all", "test")) == len(splits["test"])


def test_a_document_of_several_blocks_is_left_out_whole(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_folder(source, tmp_path / "whole")
    monkeypatch.setattr("moebench.tasks.text.prepared.source.BLOCK", 300)
    prepare_folder(source, tmp_path / "cut")
    # Cuts lose 13-grams, so a document near the limit could differ; there is none here.
    assert texts_of(tmp_path / "cut", "test") == texts_of(tmp_path / "whole", "test")


class StoppedError(Exception):
    """In place of a kill."""


@pytest.mark.parametrize(
    "content",
    [None, *(pytest.param(text, marks=pytest.mark.slow) for text in (b"", b"[]")), b'{"blocks": 3, "documents": {}}'],
)
def test_a_stopped_call_continues_with_what_it_measured(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    def stop(*arguments: Any) -> None:
        raise StoppedError

    prepare_folder(source, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(build.ShardBuilder, "write", stop)
        with pytest.raises(StoppedError):
            prepare_folder(source, tmp_path / "out")
    if content is not None:
        (tmp_path / "out" / "overlap.json").write_bytes(content)
    stages = []
    options = options_for(source, tmp_path / "out")
    build.build_folder(options, lambda stage, progress: stages.append(stage))
    assert ("measuring overlap" in stages) == (content is not None)
    assert folder_content(tmp_path / "out") == folder_content(tmp_path / "whole")


def test_a_split_that_would_keep_nothing_is_refused(tmp_path: Path) -> None:
    text = draw_text(random.Random(1), 50)
    for name in ("train", "validation", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": text}))
    with pytest.raises(UsageError, match="the validation split has no documents"):
        prepare_folder(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
