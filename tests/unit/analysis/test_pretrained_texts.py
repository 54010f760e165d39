"""The texts that models of transformers are probed on."""

import json
from pathlib import Path

import pytest
from support.prepared_text import draw_rows, prepare_folder

from moebench.analysis.pretrained.texts import read_texts
from moebench.errors import UsageError
from moebench.tasks.text.sources import TextDataConfig, load_documents
from moebench.tasks.text.splits import split_documents


def test_the_default_is_the_test_split_of_the_embedded_text(tmp_path: Path) -> None:
    documents = read_texts(None, 1000, tmp_path)
    expected = split_documents(load_documents(TextDataConfig()))["test"]
    assert sorted(document.text for document in documents) == sorted(document.text for document in expected)
    assert len({document.domain for document in documents}) == 7


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe4096"])
def test_a_prepared_folder_is_decoded_to_the_documents_of_its_test_split(tmp_path: Path, tokenizer: str) -> None:
    rows = draw_rows(60)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepare_folder(tmp_path / "rows.jsonl", tmp_path / "prepared", tokenizer=tokenizer)
    documents = read_texts(str(tmp_path / "prepared"), 100_000, tmp_path / "cache")
    known = {(row["text"], row["domain"]) for row in rows}
    assert {document.domain for document in documents} == {"x", "y"}
    assert all((document.text, document.domain) in known for document in documents)
    assert 6 <= len(documents) <= 24  # about a fifth


def test_all_of_a_file_is_read_or_its_test_split(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("all of it")
    assert [document.text for document in read_texts(str(tmp_path / "one.txt"), 1000, tmp_path)] == ["all of it"]
    for part in ("train", "test"):
        (tmp_path / "parts" / part).mkdir(parents=True)
        (tmp_path / "parts" / part / "a.txt").write_text(f"text of {part}")
    assert [document.text for document in read_texts(str(tmp_path / "parts"), 1000, tmp_path)] == ["text of test"]
    with pytest.raises(UsageError, match=r"--data: '.*nowhere' does not exist"):
        read_texts(str(tmp_path / "nowhere"), 1000, tmp_path)
