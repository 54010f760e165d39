"""The script that makes the embedded corpus: text of each kind of file, near duplicates, choice by domain."""

import io
import random
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import build_corpus

    return build_corpus


@pytest.fixture
def readers(script: Any) -> Any:
    return sys.modules["corpus_readers"]


def test_markup_becomes_paragraphs(readers: Any) -> None:
    page = """<!DOCTYPE html><html><head><title>T</title></head><body><nav><p>menu</p></nav>
    <div class="related x"><div>up</div> next</div><h1>Title</h1><p>One <b>bold</b>
    word &amp; &lt;more&gt;.<p>Not closed<pre>  a
    b</pre><script>if (a < b) {}</script><br/>end</body></html>"""
    assert readers.read_markup(page) == "Title\n\nOne bold word & <more>.\nNot closed\n  a\n    b\n\nend"


def test_a_manual_page_loses_its_requests(readers: Any) -> None:
    page = r""".\" comment
.TH LS 1 "2022"
.SH NAME
ls \- list \fBfiles\fP
.TP
\fB\-a\fP, \(lqall\(rq
.BR ls (1)
.nf
x\ey"""
    assert readers.read_man(page) == "LS 1 2022\n\nNAME\n\nls - list files\n\n-a, “all”\nls(1)\nx\\y"


def test_long_texts_are_cut_at_line_ends(readers: Any) -> None:
    text = "\n".join(f"line {n} ü" for n in range(50))
    pieces = list(readers.cut(text, 100))
    assert "".join(pieces) == text
    assert max(len(piece.encode()) for piece in pieces) <= 100
    assert all(piece.startswith("\n") for piece in pieces[1:])
    assert list(readers.cut("ü" * 30, 20)) == ["ü" * 10] * 3  # without lines, between characters


def test_near_duplicates_are_dropped_and_other_texts_are_not(script: Any) -> None:
    draw = random.Random(0)
    texts = [" ".join(f"w{draw.randrange(10**6)}" for _ in range(2000)) for _ in range(3)]
    texts.append(texts[0].replace("w1", "x1", 3) + " and something more")
    rows = [script.Row("a", f"g{n}", "s", text) for n, text in enumerate(texts)]
    dropped: Counter[str] = Counter()
    assert list(script.drop_duplicates(rows, map(script.sample_ngrams, rows), dropped)) == rows[:3]
    assert dropped == {"a": 1}


def test_each_domain_has_its_bytes_and_the_file_its_rows(script: Any, tmp_path: Path) -> None:
    rows = [script.Row(domain, f"g{n}", "s", f"{n:04}" * 25) for domain in "ab" for n in range(9)]
    selected = script.cap(rows, 350)
    assert Counter(row.domain for row in selected) == {"a": 3, "b": 3}
    assert script.cap(rows[::-1], 350) == selected  # whatever the order
    script.write(selected, tmp_path / "x.parquet", 3)
    assert pq.read_table(tmp_path / "x.parquet").to_pylist() == [vars(row) for row in selected]


def test_files_are_read_by_the_source_that_names_them(script: Any) -> None:
    options = {"package": "p", "domain": "code-c", "pattern": r"\.[ch]$", "group": "p", "licence": "MIT"}
    source = script.Source(reader="tar", **options)
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:xz") as members:
        for name, content in (("p/b.c", b"int b;  \r\n"), ("p/a.h", b"int a;"), ("p/test/c.c", b"x"), ("p/r.md", b"x")):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            members.addfile(entry, io.BytesIO(content))
    rows = list(script.read_member("/usr/src/p.tar.xz", archive.getvalue(), [source]))
    assert [row.text for row in rows] == ["int a;", "int b;"]
    assert {(row.domain, row.group, row.source) for row in rows} == {("code-c", "p", "p")}


def test_every_package_that_is_pinned_is_a_source(script: Any) -> None:
    sources = {source.package: source for source in script.list_sources()}
    assert set(script.read_packages()) <= {*sources, script.BIBLES}
    assert all(source.licence for source in sources.values())
    assert not script.is_prose_or_code("0x12, 0x34,\n" * 200)
