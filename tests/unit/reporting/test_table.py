"""One table value, printed for the terminal and as Markdown."""

from io import StringIO

import pytest
from rich.console import Console

from moebench.reporting.report import Report
from moebench.reporting.table import Column, Table

TABLE = Table(
    title="Loads [bold]",
    columns=(Column(header="arm", align="left", wraps=True), Column(header="dropped", style=lambda cell: "red")),
    rows=(("a|b", "1.0 %"), ("[red]c", "–")),
    notes=("first note", "second note"),
)


def render(table: Table | Report, width: int = 40, color_system: str | None = None) -> str:
    out = StringIO()
    Console(file=out, width=width, color_system=color_system, force_terminal=bool(color_system)).print(table.to_rich())
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def test_terminal() -> None:
    assert render(TABLE) == (
        "Loads [bold]\narm     dropped\n────────────────\na|b       1.0 %\n[red]c        –\nfirst note\nsecond note"
    )


def test_markdown() -> None:
    assert TABLE.to_markdown() == (
        "**Loads [bold]**\n\n| arm | dropped |\n| :-- | --: |\n| a\\|b | 1.0 % |\n| [red]c | – |"
        "\n\n- first note\n- second note"
    )


def test_a_table_without_title_and_notes_is_only_rows() -> None:
    table = Table(columns=(Column(header="x\ny"),), rows=(("1",),))
    assert table.to_markdown() == "| x y |\n| --: |\n| 1 |"
    assert render(table) == "x\ny\n──\n1"


def test_columns_that_do_not_fit_become_lines() -> None:
    columns = (Column(header="long", align="left"), Column(header="text", align="left", wraps=True))
    text = render(Table(columns=columns, rows=(("abcde", "one two"),)), width=9)
    assert text.split() == ["long", "abcde", "text:", "one", "two"]


def test_a_row_needs_a_cell_for_each_column() -> None:
    with pytest.raises(IndexError):
        render(Table(columns=(Column(header="x"), Column(header="y")), rows=(("1",),)))


def test_cells_are_styled_by_their_text() -> None:
    assert "\x1b[31m  1.0 %" in render(TABLE, color_system="standard")


def test_caveats_stand_below_the_first_table() -> None:
    report = Report(tables=(TABLE, TABLE), caveats=("an early look",), values={})
    assert report.to_markdown().count("- second note\n\n- an early look\n\n") == 1
    assert render(report).count("second note\nan early look\n\n") == 1
    assert Report(tables=(), caveats=("an early look",), values={}).to_markdown() == "- an early look\n"


def test_a_heading_stands_before_the_tables() -> None:
    report = Report(tables=(TABLE,), heading=("a model", "0.9 bits per byte"), values={})
    assert report.to_markdown().startswith("- a model\n- 0.9 bits per byte\n\n**Loads")
    assert render(report).startswith("a model\n0.9 bits per byte\n\nLoads")


def test_a_report_has_tables_then_problems_then_notes() -> None:
    report = Report(tables=(TABLE,), problems=("FAILED a", "MISSING b"), notes=("a legend",), values={"x": 1})
    assert report.to_markdown().endswith("- second note\n\n- FAILED a\n- MISSING b\n\n- a legend\n")
    assert render(report).endswith("second note\n\nFAILED a\nMISSING b\na legend")
    assert report.to_json() == '{\n "x": 1\n}'
