"""Tables at any width and in any encoding; figures in the format of their suffix; commands that can be pasted."""

import io
import json
import shlex
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from moebench.cli.encoding import use_replacements
from moebench.cli.options import CommandArguments, check_plot
from moebench.cli.output import make_console
from moebench.errors import UsageError
from moebench.reporting.canvas import new_figure
from moebench.reporting.report import Report
from moebench.reporting.table import Column, Table

MAGIC = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}
HEADERS = ("seeds", "mean", "minus dense", "p Holm")
LABELS = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=60)


def build_table(label: str, title: str = "Quality") -> Table:
    columns = (Column(header="arm", align="left", wraps=True), *(Column(header=header) for header in HEADERS))
    verdict = Column(header="verdict", align="left", wraps=True)
    row = (label, "3 of 5", "2.0000 ± 0.0196", "−0.0102 ± 0.0033", "<0.001", "no difference shown")
    return Table(title=title, columns=(*columns, verdict), rows=(row,))


def print_in(encoding: str, report: Report, width: int) -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, errors="moebench")
    Console(file=stream, width=width, highlight=False, markup=False, color_system=None).print(report.to_rich())
    stream.flush()
    return raw.getvalue().decode(encoding)


@given(width=st.integers(40, 250), encoding=st.sampled_from(["utf-8", "latin-1", "ascii", "cp1252"]), label=LABELS)
def test_no_table_fails_or_loses_arm_or_verdict(width: int, encoding: str, label: str) -> None:
    use_replacements()
    report = Report(tables=(build_table(label),), notes=("± half of the interval ≤ 1",), values={})
    text = print_in(encoding, report, width)
    for piece in ("arm", "verdict", *["no", "difference", "shown"], *["3", "of", "5"]):
        assert piece in text
    expected = label.encode(encoding, "moebench").decode(encoding)
    # The label may be broken over lines, and white space in it is free.
    printed = "".join(c for c in text if not c.isspace())
    assert all(c in printed for c in "".join(expected.split()))
    assert "…" not in text.replace(label, "")


@pytest.mark.parametrize("label", ["top [/2]", "[bold]a[/bold]", "a{$", "x [red]"])
@pytest.mark.parametrize("width", [40, 80, 200])
def test_brackets_are_shown(label: str, width: int) -> None:
    text = print_in("utf-8", Report(tables=(build_table(label),), values={}), width)
    assert all(word in text for word in label.split())


def test_titles_do_not_wrap_on_a_wide_terminal() -> None:
    title = (
        "Quality: bits per byte on the test split, lower is better, and some more words that are longer than the table"
    )
    assert title in print_in("utf-8", Report(tables=(build_table("a", title),), values={}), 200).splitlines()


def test_narrow_terminal_gets_the_columns_in_parts() -> None:
    lines = print_in("utf-8", Report(tables=(build_table("switch"),), values={}), 40).splitlines()
    assert [line.split() for line in lines if "─" not in line][:7] == [
        ["Quality"],
        ["arm", "seeds", "mean"],
        ["switch", "3", "of", "5", "2.0000", "±", "0.0196"],
        ["arm", "minus", "dense", "p", "Holm"],
        ["switch", "−0.0102", "±", "0.0033", "<0.001"],
        ["arm", "verdict"],
        ["switch", "no", "difference", "shown"],
    ]


def test_very_narrow_terminal_gets_one_value_a_line() -> None:
    lines = print_in("utf-8", Report(tables=(build_table("switch"),), values={}), 20).splitlines()
    words = [line.strip() for line in lines]
    assert words[:5] == [
        "Quality",
        "arm switch",
        "seeds: 3 of 5",
        "mean: 2.0000 ±",
        "0.0196",
    ]


def test_no_color_prints_no_escape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    console = make_console()
    console.file = io.StringIO()
    console.print(build_table("switch").to_rich())
    assert "\x1b" not in console.file.getvalue()
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "xterm")
    console = make_console()
    console.file = io.StringIO()
    console.print(build_table("switch").to_rich())
    assert "\x1b[1m" in console.file.getvalue()


@pytest.mark.parametrize("suffix", MAGIC)
def test_figures_have_the_format_of_their_suffix(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"figure{suffix}"
    check_plot(file)
    with new_figure(file, "title", width=3, height=2):
        pass
    assert file.read_bytes().startswith(MAGIC[suffix])


@pytest.mark.parametrize("name", ["x.gif", "x", "x.jpeg", "x.png.txt"])
def test_unknown_suffix_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"the suffix chooses the format; allowed: \.png, \.pdf, \.svg"):
        check_plot(tmp_path / name)


def test_recommended_commands_are_quoted() -> None:
    arguments = CommandArguments(
        experiment="my file.yaml",
        overrides=("grid.router=[dense, switch]", "question=it's"),
        plugins=("a b.py",),
        results=Path("my results"),
    )
    parts = ["my file.yaml", "grid.router=[dense, switch]", "question=it's"]
    options = ["--plugin", "a b.py", "--results", "my results"]
    assert shlex.split(arguments.format("compare")) == ["moebench", "compare", *parts, *options]
    assert shlex.split(arguments.format_ui(None)) == ["moebench", "ui", "--results", "my results"]
    assert CommandArguments(experiment="quickstart").format("compare") == "moebench compare quickstart"


def test_json_is_escaped_where_the_encoding_lacks_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report(tables=(), values={"arm": "größe ×"})
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    text = report.to_json()
    assert text.isascii()
    assert json.loads(text) == report.values
