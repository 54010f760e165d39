"""Texts of many kinds: encodings, layouts, splits, copies, and too little text."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moebench.errors import UsageError
from moebench.tasks.text.document import Document
from moebench.tasks.text.sources import TextDataConfig, load_documents, source_digest
from moebench.tasks.text.splits import split_documents
from moebench.tasks.text.windows import PreparedText, prepare


def write(root: Path, **files: bytes | str) -> Path:
    for name, content in files.items():
        path = root / name.replace("__", "/")
        path = path if "." in path.name else path.with_name(f"{path.name}.txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def documents(path: Path, **options: Any) -> list[Document]:
    return load_documents(TextDataConfig(path=str(path), **options))


def test_a_byte_order_mark_is_removed_and_line_ends_are_kept(tmp_path: Path) -> None:
    write(tmp_path, a=b"\xef\xbb\xbfone\r\ntwo\n")
    assert [d.text for d in documents(tmp_path / "a.txt")] == ["one\r\ntwo\n"]


NO_TEXT: dict[str, tuple[bytes, str]] = {
    "latin-1": ("Größe".encode("latin-1"), "'sub/bad.txt' cannot be read: it is not UTF-8 .*iconv"),
    "utf-16": ("text".encode("utf-16"), "'sub/bad.txt' cannot be read: it is not UTF-8 .*iconv"),
    "utf-16 without a mark": ("text".encode("utf-16-le"), "'sub/bad.txt' has NUL bytes: is it UTF-16"),
    "zeros": (bytes(100), "'sub/bad.txt' has NUL bytes"),
}


@pytest.mark.parametrize("kind", NO_TEXT)
def test_text_that_is_not_utf_8_is_named(tmp_path: Path, kind: str) -> None:
    content, words = NO_TEXT[kind]
    write(tmp_path / "set", good="good", sub__bad=content)
    with pytest.raises(UsageError, match=words) as caught:
        documents(tmp_path / "set")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", " \n\t\r\n ", "\ufeff"])
def test_blank_texts_are_skipped(tmp_path: Path, content: str) -> None:
    write(tmp_path / "set", blank=content)
    with pytest.raises(UsageError, match=r"task\.data\.path: '.*set' has no text"):
        documents(tmp_path / "set")
    write(tmp_path / "set", good="good")
    assert [d.text for d in documents(tmp_path / "set")] == ["good"]


ROWS: dict[str, tuple[dict[str, list[Any]], dict[str, Any], str | list[str]]] = {
    "words that readers take for nothing": ({"text": ["NA", "null", "007", "1e5", "true"]}, {}, "NA null 007 1e5 true"),
    "half a character": ({"text": ["a", "\ud800"]}, {}, ["row 1 contains a lone surrogate"]),
    "nul": ({"text": ["a\0b"]}, {}, ["row 0 has NUL bytes"]),
    "number": ({"text": [3]}, {}, ["row 0 is ", ", not text"]),
    "list": ({"text": [["a", "b"]]}, {}, ["row 0 is list, not text"]),
    "nested": ({"text": [{"body": "a"}]}, {}, ["row 0 is dict, not text"]),
    "domain list": ({"text": ["a"], "domain": [["x"]]}, {}, ["task.data.domain_column", "row 0 is list"]),
    "group null": ({"text": ["a"], "who": [None]}, {"group_column": "who"}, ["task.data.group_column", "row 0 is"]),
    "group missing": ({"text": ["a"]}, {"group_column": "who"}, ["task.data.group_column", "'who'", "text"]),
}


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("kind", ROWS)
def test_rows_are_read_as_they_are_or_refused(tmp_path: Path, kind: str, ending: str) -> None:
    columns, options, expected = ROWS[kind]
    path = tmp_path / f"a.{ending}"
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    plain = all(isinstance(cell, str) for cells in columns.values() for cell in cells)
    if ending == "csv" and not plain and kind != "group missing":
        pytest.skip("a CSV has texts alone")
    if kind == "half a character" and ending != "jsonl":
        pytest.skip("JSON alone can say it")
    if ending == "parquet":
        pq.write_table(pa.table(columns), path)
    elif ending == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        path.write_text("\n".join([",".join(columns), *(",".join(row.values()) for row in rows)]))
    if isinstance(expected, str):
        assert " ".join(d.text for d in documents(path)) == expected
        return
    with pytest.raises(UsageError) as caught:
        documents(path, **options)
    assert all(words in str(caught.value) for words in expected), caught.value
    assert "\n" not in str(caught.value)


def test_large_and_coded_strings_and_a_book_in_a_cell(tmp_path: Path) -> None:
    book = 'word, "said" she;\n' * 40_000
    columns = {"text": pa.array([book, "b"], pa.large_string()), "domain": pa.array(["x", "y"]).dictionary_encode()}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    (tmp_path / "b.csv").write_text('text,domain\n"' + book.replace('"', '""') + '",x\nb,y\n')
    for name in ("a.parquet", "b.csv"):
        assert [(d.text, d.domain) for d in documents(tmp_path / name)] == [(book, "x"), ("b", "y")]


def test_a_folder_of_texts_with_odd_names_and_encodings(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", linked="linked")
    root = tmp_path / "set"
    write(
        root,
        UPPER="upper",
        news__a="a",
        **{"two words.TXT": "words", ".hidden.txt": "no", "é.txt.GZ": gzip.compress(b"z")},
    )
    write(root / ".git", x="no")
    (root / "more").symlink_to(tmp_path / "elsewhere")
    texts_of = {(d.domain, d.text) for d in documents(root)}
    assert texts_of == {("UPPER", "upper"), ("news", "a"), ("two words", "words"), ("é", "z"), ("more", "linked")}
    (root / "gone.txt").symlink_to(tmp_path / "nowhere")
    source_digest(TextDataConfig(path=str(root)))
    with pytest.raises(UsageError, match=r"'gone\.txt' cannot be read \(.*No such file"):
        documents(root)


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    write(tmp_path / "set", a="a")
    # Reading the memory of a process at its beginning fails for everyone, the superuser included.
    (tmp_path / "set" / "b.txt").symlink_to(f"/proc/{os.getpid()}/mem")
    source_digest(TextDataConfig(path=str(tmp_path / "set")))
    with pytest.raises(UsageError, match=r"'b\.txt' cannot be read"):
        documents(tmp_path / "set")


def texts(split: dict[str, list[Document]]) -> dict[str, list[str]]:
    return {name: sorted(d.text for d in members) for name, members in split.items()}


def test_three_splits_stay_as_given(tmp_path: Path) -> None:
    write(tmp_path / "a", train="one", valid="two", test="three")
    write(tmp_path / "b", train__x="one", val__x="two", test__x="three")
    write(
        tmp_path / "c",
        **{f"{n}.jsonl": json.dumps({"text": t}) for n, t in (("train", "one"), ("dev", "two"), ("test", "three"))},
    )
    for name, domain in (("a", "all"), ("b", "x"), ("c", "all")):
        members = documents(tmp_path / name)
        assert {d.domain for d in members} == {domain}
        assert texts(split_documents(members)) == {"train": ["one"], "validation": ["two"], "test": ["three"]}


def test_a_missing_part_is_taken_from_the_training_part(tmp_path: Path) -> None:
    write(tmp_path / "set", **{f"train__{i}": f"text {i} " * 10 for i in range(20)}, test__a="held")
    split = texts(split_documents(documents(tmp_path / "set", domain_column=None)))
    assert split["test"] == ["held"]
    assert (len(split["train"]), len(split["validation"])) == (18, 2)


def test_equal_texts_are_in_one_split() -> None:
    members = [Document(text=f"text {i % 10}", domain="d", group=f"g{i}") for i in range(40)]
    split = texts(split_documents(members))
    assert sum(len(set(part)) for part in split.values()) == 10
    assert sum(map(len, split.values())) == 40


def prepare_file(path: Path, length: int = 4, **options: Any) -> PreparedText:
    return prepare(TextDataConfig(path=str(path), tokenizer="bytes", **options), path.parent / "cache", length)


def test_a_test_text_that_is_trained_on_is_reported_and_so_are_other_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = "This stands in both of them."
    write(tmp_path / "set", train__a=copied, train__b="And this in one.", val__a="Another one", test__a=copied)
    write(tmp_path / "set", **{"notes.md": "x"})
    prepare_file(tmp_path / "set", domain_column=None, remove_overlap=False)
    assert capsys.readouterr().err == (
        f"task.data: '{tmp_path / 'set'}' has 1 file(s) of other kinds, which are not read (1 .md)\n"
        "task.data: 1 of 1 test documents are also in the training split, word for word\n"
    )
    prepare_file(tmp_path / "set", domain_column=None, remove_overlap=False)
    assert capsys.readouterr().err == ""  # once, when it is prepared


def test_one_giant_line_is_divided_and_too_short_a_text_is_refused(tmp_path: Path) -> None:
    write(tmp_path, giant="x" * 1_000_000, short="abc")
    text = prepare_file(tmp_path / "giant.txt", 64)
    assert [len(s.tokens_N) for s in (text.train, text.validation, text.test)] == [800_001, 100_001, 100_001]
    refused = r"the text has \d+ tokens of train text, less than one window of 65; .* sequence, or more text$"
    with pytest.raises(UsageError, match=refused):
        prepare_file(tmp_path / "short.txt", 64)
    assert not list((tmp_path / "cache").glob("text-*.[a-z0-9_]*/"))  # nothing half written


def test_a_budget_below_a_byte_for_each_domain_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "set", **{f"d{i}": "text" for i in range(9)})
    with pytest.raises(UsageError, match=r"task\.data\.max_bytes: 8 for 9 domains is less than one byte each"):
        documents(tmp_path / "set", max_bytes=8)


def test_each_part_has_its_share_of_a_budget(tmp_path: Path) -> None:
    write(tmp_path / "set", dev__a="d" * 400, test__a="t" * 400, train__a="x" * 800)
    members = documents(tmp_path / "set", max_bytes=400)
    assert {d.part: len(d.text) for d in members} == {"validation": 100, "test": 100, "train": 200}


def test_the_digest_of_a_folder_sees_the_names_that_become_domains(tmp_path: Path) -> None:
    write(tmp_path / "a", news="text")
    write(tmp_path / "b", law="text")
    folders = [source_digest(TextDataConfig(path=str(tmp_path / name))) for name in "ab"]
    files = [source_digest(TextDataConfig(path=str(tmp_path / name))) for name in ("a/news.txt", "b/law.txt")]
    assert folders[0] != folders[1]
    assert files[0] == files[1]


def test_compressed_texts_and_tables_read_like_plain_ones(tmp_path: Path) -> None:
    rows = "\n".join(json.dumps({"text": f"text {number}\r\n é"}) for number in range(50))
    array = json.dumps([json.loads(row) for row in rows.splitlines()], indent=2)
    for name, content in (("a.jsonl", rows), ("a.json", array), ("a.txt", "é\r\n" * 5000)):
        plain = write(tmp_path / name, **{name: content}) / name
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
        with pa.CompressedOutputStream(str(tmp_path / f"{name}.zst"), "zstd") as file:
            file.write(content.encode())
        expected = [document.text for document in documents(plain)]
        for packed in (".gz", ".zst"):
            assert [document.text for document in documents(tmp_path / f"{name}{packed}")] == expected


def test_a_torn_zstd_file_is_named(tmp_path: Path) -> None:
    with pa.CompressedOutputStream(str(tmp_path / "a.txt.zst"), "zstd") as file:
        file.write(os.urandom(5000).hex().encode())
    complete = (tmp_path / "a.txt.zst").read_bytes()
    (tmp_path / "a.txt.zst").write_bytes(complete[: len(complete) // 2])
    with pytest.raises(UsageError, match=r"'a\.txt\.zst' cannot be read \("):
        documents(tmp_path / "a.txt.zst")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"data": [{"text": "a"}]}', r"has its rows under the key 'data'; allowed: an array of rows"),
        ('{"version": "1", "rows": [{"text": "a"}]}', r"has its rows under the key 'rows'"),
        ('{\n "data": [{"text": "a"}]\n}', r"is one object over several lines; allowed: an array of rows, or one row"),
        ('[{"text": "a"} {"text": "b"}]', r"cannot be read \(',' or '\]' is missing after a row\)"),
        ('[{"text": "a"}', r"cannot be read"),
        ('[{"text": "a"}] x', r"there is text after the array"),
    ],
)
def test_json_that_is_no_list_of_rows_is_one_line(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UsageError, match=words) as caught:
        documents(tmp_path / "a.json")
    assert "\n" not in str(caught.value)


def test_a_folder_of_save_to_disk_is_named(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(str(tmp_path / "saved"))
    split = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a"]})})
    split.save_to_disk(str(tmp_path / "splits"))
    for name in ("saved", "splits"):
        with pytest.raises(UsageError, match=rf"'.*{name}' was written by save_to_disk .*; allowed: its splits as"):
            documents(tmp_path / name)


def test_rows_and_files_have_a_longest_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moebench.tasks import streams

    monkeypatch.setattr(streams, "LONGEST_ROW", 100)
    monkeypatch.setattr(streams, "LONGEST_FILE", 200)
    monkeypatch.setattr(streams, "CHUNK", 16)
    write(tmp_path, a="x" * 201)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "x" * 99}))
    (tmp_path / "c.json").write_text(json.dumps([{"text": "x"}, {"text": "x" * 999}]))
    for name, words in (("a.txt", "in one file"), ("b.jsonl", "line 1 of"), ("c.json", "row 1 of")):
        with pytest.raises(UsageError, match=f"{words}.*more than|more than.*{words}"):
            documents(tmp_path / name)
    (tmp_path / "d.json").write_text(json.dumps([{"text": f"{number} " * 10} for number in range(30)]))
    assert len(documents(tmp_path / "d.json")) == 30
