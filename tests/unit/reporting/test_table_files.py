"""Tables as CSV with every digit, and as LaTeX."""

import csv

import pytest

from moebench.errors import UsageError
from moebench.reporting.formatting import format_p, format_percent, format_signed, format_with_interval
from moebench.reporting.metrics import format_metric
from moebench.reporting.table import Column, Table
from moebench.reporting.table_files import escape_latex, format_csv, format_latex, name_tables, write_tables

DELTA = format_with_interval(-1 / 3, (-0.5, -1 / 6), format_signed)
TABLE = Table(
    title="Quality: bits per byte, 50 % of it",
    columns=(
        Column(header="arm", align="left"),
        Column(header="minus\ndense"),
        Column(header="p"),
        Column(header="verdict", align="left"),
    ),
    rows=(("dense", "–", "–", "baseline"), ("=cmd|' /C calc'!A0", DELTA, format_p(0.0004), "better")),
    notes=("a_note",),
)


def test_csv_has_all_digits_and_an_interval_in_columns_of_its_own() -> None:
    assert list(csv.reader(format_csv(TABLE).splitlines())) == [
        ["arm", "minus dense", "minus dense low", "minus dense high", "p", "verdict"],
        ["dense", "", "", "", "", "baseline"],
        ["'=cmd|' /C calc'!A0", repr(-1 / 3), "-0.5", repr(-1 / 6), "0.0004", "better"],
    ]


def test_numbers_keep_their_value_and_are_texts() -> None:
    assert (DELTA, DELTA.value, DELTA.interval) == ("−0.3333 ± 0.1667", -1 / 3, (-0.5, -1 / 6))
    assert (format_percent(0.0125), format_percent(0.0125).value) == ("1.2 %", 0.0125)
    assert (format_metric("p_holm", 0.05), format_metric("p_holm", 0.05).value) == ("0.050", 0.05)
    assert f"{DELTA} better" == "−0.3333 ± 0.1667 better"


def test_latex_prints_the_table_and_nothing_else() -> None:
    assert format_latex(TABLE).splitlines() == [
        r"\begin{table}",
        r"\centering",
        r"\caption{Quality: bits per byte, 50 \% of it}",
        r"\begin{tabular}{lrrl}",
        r"\toprule",
        r"arm & minus dense & p & verdict \\",
        r"\midrule",
        r"dense & -- & -- & baseline \\",
        r"=cmd\textbar{}{'} /C calc{'}!A0 & $-$0.3333 $\pm$ 0.1667 & \textless{}0.001 & better \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"\par\footnotesize a\_note",
        r"\end{table}",
    ]


@pytest.mark.parametrize(
    ("text", "latex"),
    [
        (r"\input{/etc/passwd}", r"\textbackslash{}input\{/etc/passwd\}"),
        ("[2cm] $x^2$ ~ #1 & 5%", r"{[}2cm{]} \$x\textasciicircum{}2\$ \textasciitilde{} \#1 \& 5\%"),
        ("* a\n\nb", "{*} a b"),  # an empty line would end a paragraph
        ("n-gram --jobs ---", "n-gram -{}-jobs -{}-{}-"),
        ("a\x1b[31m", r"a\textbackslash{}x1b{[}31m"),
        ("≠FLOPs × 2", r"$\neq$FLOPs $\times$ 2"),
    ],
)
def test_every_text_is_escaped(text: str, latex: str) -> None:
    assert escape_latex(text) == latex


def test_files_are_named_by_titles(tmp_path) -> None:
    names = ("Cost: speed, parameters", "By n: a", "By n: b", "", "../../etc")
    tables = [Table(title=title, columns=(Column(header="x"),), rows=(("1",),)) for title in names]
    assert list(name_tables(tables)) == ["cost", "by_n", "by_n_2", "table", "etc"]
    files = write_tables(tables[:1], tmp_path / "new")
    assert [file.name for file in files] == ["cost.csv", "cost.tex"]
    assert files[0].read_text() == "x\n1\n"


def test_a_file_in_place_of_the_folder_is_a_mistake(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"--tables .*file: the folder cannot be created"):
        write_tables([TABLE], tmp_path / "file")
