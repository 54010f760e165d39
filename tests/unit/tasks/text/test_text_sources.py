import gzip
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moebench.config import resolve
from moebench.errors import UsageError
from moebench.tasks.sources import warn_of_changing_data
from moebench.tasks.text.document import Document
from moebench.tasks.text.pack import PACKS, pack_group
from moebench.tasks.text.sources import TextDataConfig, load_documents, source_digest
from moebench.tasks.text.splits import split_documents

ROWS = [{"text": f"text {i}", "domain": "ab"[i % 2], "author": f"author {i // 2}"} for i in range(6)]


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def texts(documents: list[Document]) -> list[str]:
    return [document.text for document in documents]


def test_pack_has_seven_domains_and_groups_that_span_code_and_docs():
    documents = load_documents(TextDataConfig())
    assert len(documents) == 627
    bytes_of = Counter()
    for document in documents:
        bytes_of[document.domain] += len(document.text.encode())
    assert sorted(bytes_of) == ["code", "dictionary", "docs", "drama", "novels", "scripture", "speeches"]
    assert all(1_800_000 < size <= 2_000_000 for size in bytes_of.values())
    shared = {d.group for d in documents if d.domain == "code"} & {d.group for d in documents if d.domain == "docs"}
    assert {"python/asyncio", "python/logging", "python/email"} <= shared


def test_the_corpus_is_chosen_by_its_name(tmp_path, monkeypatch):
    rows = [{"domain": f"code-{n % 2}", "group": f"p{n % 3}", "source": "s", "text": f"text {n}"} for n in range(7)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "small.parquet")
    monkeypatch.setitem(PACKS, "corpus", tmp_path / "small.parquet")
    documents = load_documents(TextDataConfig(pack="corpus"))
    assert [(d.domain, d.group, d.text) for d in documents] == [(r["domain"], r["group"], r["text"]) for r in rows]
    few = [load_documents(TextDataConfig(pack="corpus", max_bytes=size)) for size in (24, 24, 36)]
    assert few[0] == few[1]  # in a fixed order, which is not that of the packages
    assert {d.text for d in few[0]} < {d.text for d in few[2]}
    assert source_digest(TextDataConfig(pack="corpus")) != source_digest(TextDataConfig())
    with pytest.raises(
        UsageError, match=r"task\.data\.pack: 'corpus' was given with task\.data\.path; set path to null"
    ):
        TextDataConfig(pack="corpus", path="x.txt")
    with pytest.raises(UsageError, match=r"task\.data\.pack: .*corpsu.*Did you mean 'corpus'"):
        resolve({"task": {"data": {"pack": "corpsu"}}})


@pytest.mark.slow
def test_every_domain_of_the_corpus_has_groups_for_all_splits():
    splits = split_documents(load_documents(TextDataConfig(pack="corpus")))
    domains = {name: {d.domain for d in members} for name, members in splits.items()}
    groups = [{d.group for d in members} for members in splits.values()]
    assert domains["train"] == domains["validation"] == domains["test"]
    assert len(domains["train"]) == 28
    assert not groups[0] & groups[1] | groups[0] & groups[2] | groups[1] & groups[2]
    assert all(len(d.text) >= 500 and len(d.text.encode()) <= 200_000 for of in splits.values() for d in of)


@pytest.mark.parametrize(
    ("domain", "doc_id", "group"),
    [
        ("speeches", "1995_william_j_clinton_d", "speeches/william_j_clinton"),
        ("speeches", "1808_thomas_jefferson_dr", "speeches/thomas_jefferson"),
        ("novels", "moby-chapter_36", "novels/moby"),
        ("novels", "austen-Sense And Sensibility-006", "novels/austen-Sense And Sensibility"),
        ("scripture", "kjv-2Chronicles", "scripture/Samuel+Kings+Chronicles+Isaiah"),
        ("scripture", "kjv-Isaiah", "scripture/Samuel+Kings+Chronicles+Isaiah"),
        ("scripture", "kjv-Luke", "scripture/Matthew+Mark+Luke"),
        ("scripture", "kjv-Nehemiah", "scripture/Ezra+Nehemiah"),
        ("scripture", "kjv-John", "scripture/John"),
        ("code", "asyncio/timeouts.py", "python/asyncio"),
        ("docs", "library/asyncio-sync.rst.txt", "python/asyncio"),
        ("code", "enum.py", "python/enum"),
        ("docs", "howto/enum.rst.txt", "python/enum"),
        ("docs", "whatsnew/3.7.rst.txt", "python/3.7.rst.txt"),
        ("drama", "othello", "drama/othello"),
        ("dictionary", "jargon-076", "dictionary/jargon-076"),
    ],
)
def test_pack_group(domain, doc_id, group):
    assert pack_group(domain, doc_id) == group


def test_every_format_gives_the_same_documents(tmp_path):
    columns = {key: [row[key] for row in ROWS] for key in ROWS[0]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    lines = ["text,domain,author", *(",".join(row.values()) for row in ROWS)]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    expected = [Document(text=r["text"], domain=r["domain"], group=r["author"]) for r in ROWS]
    for name in ("a.parquet", "a.jsonl", "a.json", "a.csv", "a.jsonl.gz"):
        assert load_documents(TextDataConfig(path=str(tmp_path / name), group_column="author")) == expected


def test_without_groups_and_domains_each_document_stands_alone(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": ""}, {"text": "two"}])
    documents = load_documents(TextDataConfig(path=path))
    assert texts(documents) == ["one", "two"]
    assert {d.domain for d in documents} == {"all"}
    assert len({d.group for d in documents}) == 2


def test_folder_of_text_files_takes_domains_from_names(tmp_path):
    (tmp_path / "news.txt").write_text("news")
    (tmp_path / "law.txt.gz").write_bytes(gzip.compress("Gesetz – ü".encode()))
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "x.txt").write_text("dear")
    (tmp_path / "letters" / "y.txt").write_text("friend")
    documents = {(d.domain, d.text) for d in load_documents(TextDataConfig(path=str(tmp_path)))}
    assert documents == {("news", "news"), ("law", "Gesetz – ü"), ("letters", "dear"), ("letters", "friend")}
    assert {d.domain for d in load_documents(TextDataConfig(path=str(tmp_path), domain_column=None))} == {"all"}
    assert load_documents(TextDataConfig(path=str(tmp_path / "news.txt")))[0].domain == "all"


def test_budget_is_shared_by_domains_and_never_cuts_a_character(tmp_path):
    rows = [
        {"text": "é" * 5, "domain": "a"},
        {"text": "b" * 4, "domain": "b"},
        {"text": "c" * 9, "domain": "b"},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    # 14 bytes: 7 each; 7 bytes of "é" are 3 whole ones (6 bytes).
    assert texts(load_documents(TextDataConfig(path=path, max_bytes=14))) == ["ééé", "bbbb", "ccc"]
    # Streaming takes 12 bytes as they come: 10 of "é", then 2 of "b".
    streamed = load_documents(TextDataConfig(path=path, max_bytes=12, streaming=True))
    assert texts(streamed) == ["é" * 5, "bb"]
    pack = load_documents(TextDataConfig(max_bytes=70_000))
    assert len({d.domain for d in pack}) == 7
    assert 69_900 < sum(len(d.text.encode()) for d in pack) <= 70_000


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"path": "a", "dataset": "b"}, ["task.data.path", "task.data.dataset"]),
        ({"streaming": True}, ["task.data.max_bytes"]),
        ({"max_bytes": 0}, ["task.data.max_bytes", "0"]),
        ({"split": "test"}, ["task.data.split", "test", "task.data.dataset"]),
        ({"text_column": ""}, ["task.data.text_column"]),
    ],
)
def test_meaningless_configurations_are_refused(options, words):
    with pytest.raises(UsageError) as caught:
        TextDataConfig(**options)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        ('{"txt": "x", "b": 1}', {}, ["task.data.text_column", "'text'", "'txt'", "columns of a.jsonl: txt, b"]),
        ('{"text": "x"}', {"domain_column": "topic"}, ["task.data.domain_column", "topic", "columns of a.jsonl: text"]),
        ('{"text": "x"}\n{"text": null}', {}, ["task.data.text_column", "row 1", "null"]),
        ('{"text": 3}', {}, ["task.data.text_column", "row 0", "int"]),
        ('{"text": "x", "domain": null}', {}, ["task.data.domain_column", "row 0"]),
        ('{"text": "x", "te', {}, ["task.data.path", "a.jsonl"]),
        ("", {}, ["task.data.path", "a.jsonl"]),
        ('{"text": ""}', {}, ["task.data.path", "no text"]),
    ],
)
def test_bad_rows_are_named(tmp_path, content, options, words):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UsageError) as caught:
        load_documents(TextDataConfig(path=str(tmp_path / "a.jsonl"), **options))
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_bad_files_are_named(tmp_path):
    for name, content in (
        ("bad.parquet", b"PAR1 no"),
        ("bad.txt", b"\xff\xfe\x00"),
        ("bad.json.gz", b"no gzip"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=f"task.data.path: .*{name}.* cannot be read"):
            load_documents(TextDataConfig(path=str(tmp_path / name)))
    with pytest.raises(UsageError, match=r"bad\.tx' does not exist\. Did you mean 'bad\.txt'"):
        load_documents(TextDataConfig(path=str(tmp_path / "bad.tx")))
    with pytest.raises(UsageError, match=r"mixes .* files; keep one kind"):
        load_documents(TextDataConfig(path=str(tmp_path)))
    (tmp_path / "bad.doc").write_text("x")
    with pytest.raises(UsageError, match=r"bad\.doc' must end in \.parquet"):
        load_documents(TextDataConfig(path=str(tmp_path / "bad.doc")))


@pytest.mark.parametrize("streaming", [True, False])
def test_named_data_set_is_read_like_a_file(hub, streaming):
    write_jsonl(hub / "held.jsonl", ROWS[:2])
    write_jsonl(hub / "test.jsonl", ROWS)
    config = TextDataConfig(dataset="on/hub", split="test", streaming=streaming, max_bytes=1000)
    assert sorted(texts(load_documents(config))) == [row["text"] for row in ROWS]
    with pytest.raises(UsageError, match=r"task\.data\.dataset: .* cannot be read .*task\.data\.path=\.\.\."):
        load_documents(TextDataConfig(dataset="on/hub", split="tset"))


def test_a_data_set_of_the_hub_without_a_commit_is_warned_of_once(hub, capsys):
    write_jsonl(hub / "train.jsonl", ROWS)
    warn_of_changing_data.cache_clear()
    for revision in (None, None, "main", "0123456789" * 4):
        load_documents(TextDataConfig(dataset="on/hub", revision=revision))
    lines = capsys.readouterr().err.splitlines()
    ending = "its content may change between runs; give a commit"
    assert lines == [
        f"task.data: data set 'on/hub' of the hub has no revision: {ending}",
        f"task.data: data set 'on/hub' of the hub has revision 'main', which is not a commit: {ending}",
    ]


LATE = [{"text": f"document {number}"} for number in range(1100)] + [{"text": "last", "domain": "b"}]


@pytest.mark.parametrize("name", ["late.jsonl", "late.jsonl.gz", "late.json"])
@pytest.mark.parametrize("streaming", [True, False])
def test_a_domain_of_late_rows_is_not_overlooked(tmp_path, name, streaming):
    lines = "\n".join(map(json.dumps, LATE)) if "jsonl" in name else json.dumps(LATE)
    (tmp_path / name).write_bytes(gzip.compress(lines.encode()) if name.endswith("gz") else lines.encode())
    options = {"streaming": streaming, "max_bytes": 10**6}
    with pytest.raises(UsageError, match=rf"^task\.data\.domain_column: 'domain' of {name}, row 0 is empty"):
        load_documents(TextDataConfig(path=str(tmp_path / name), **options))
    documents = load_documents(TextDataConfig(path=str(tmp_path / name), domain_column=None, **options))
    assert (len(documents), {document.domain for document in documents}) == (1101, {"all"})


def test_columns_of_any_row_can_be_named(tmp_path):
    rows = [{"words": f"a {number}", "kind": "x"} for number in range(1100)] + [{"words": "b", "kind": "x", "by": "z"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(UsageError, match=r"task\.data\.group_column: 'by' of a\.jsonl, row 0 is empty"):
        load_documents(TextDataConfig(path=path, text_column="words", domain_column="kind", group_column="by"))
    assert len(load_documents(TextDataConfig(path=path, text_column="words", domain_column="kind"))) == 1101


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_files_of_one_folder_have_all_domains_or_none(tmp_path, order):
    (tmp_path / f"{order[0]}.csv").write_text("text,domain\none,x\n")
    (tmp_path / f"{order[1]}.csv").write_text("text\ntwo\n")
    line = f"task.data.domain_column: 'domain' is a column of {order[0]}.csv and not of {order[1]}.csv; add it to every"
    with pytest.raises(UsageError, match=line.replace(".", r"\.")):
        load_documents(TextDataConfig(path=str(tmp_path)))
    documents = load_documents(TextDataConfig(path=str(tmp_path), domain_column=None))
    assert sorted(texts(documents)) == ["one", "two"]


@pytest.mark.parametrize(
    "rows", [[{"text": "a"}, {"text": "b", "domain": "x"}], [{"text": "a", "domain": "x"}, {"text": "b"}]]
)
def test_streamed_rows_have_all_domains_or_none(monkeypatch, rows):
    monkeypatch.setattr("moebench.tasks.text.sources.load_dataset", lambda *given, **options: rows)
    config = TextDataConfig(dataset="on/hub", streaming=True, max_bytes=100)
    having, lacking = (0, 1) if "domain" in rows[0] else (1, 0)
    with pytest.raises(UsageError, match=f"domain_column: row {having} has 'domain' and row {lacking} has not; set it"):
        load_documents(config)
    assert texts(load_documents(replace(config, domain_column=None))) == ["a", "b"]


def test_digest_is_of_the_content_and_not_of_the_location(tmp_path):
    first = write_jsonl(tmp_path / "a.jsonl", ROWS)
    second = write_jsonl(tmp_path / "b.jsonl", ROWS)
    digest = source_digest(TextDataConfig(path=first))
    assert digest == source_digest(TextDataConfig(path=second))
    assert digest != source_digest(TextDataConfig(path=first, group_column="author"))
    assert digest != source_digest(TextDataConfig(path=first, max_bytes=9))
    write_jsonl(tmp_path / "b.jsonl", ROWS[:-1])
    assert digest != source_digest(TextDataConfig(path=second))
    assert source_digest(TextDataConfig(dataset="x/y")) != source_digest(TextDataConfig(dataset="x/y", revision="z"))


def test_digest_sees_the_tokenizer_file(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    digest = source_digest(TextDataConfig(tokenizer=str(tmp_path)))
    assert digest == source_digest(TextDataConfig(tokenizer=str(tmp_path / "tokenizer.json")))
    (tmp_path / "tokenizer.json").write_text('{"a": 1}')
    assert digest != source_digest(TextDataConfig(tokenizer=str(tmp_path)))


def test_parts_are_not_streamed(tmp_path):
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a b"}\n')
    config = TextDataConfig(path=str(tmp_path), streaming=True, max_bytes=10)
    with pytest.raises(UsageError, match=r"task\.data\.streaming: true was given, but the first part") as caught:
        load_documents(config)
    assert "\n" not in str(caught.value)
