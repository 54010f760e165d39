"""Tables as files: CSV with every digit for programs, LaTeX (booktabs) for papers."""

import csv
import io
import re
from collections.abc import Iterable
from pathlib import Path

from moebench.errors import UsageError
from moebench.printable import make_printable
from moebench.reporting.formatting import MISSING, NumberText
from moebench.reporting.table import Column, Table
from moebench.runs.folder import write_atomically

FORMULA = ("=", "+", "-", "@")
"""First characters of texts that a spreadsheet would evaluate as a formula."""
LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_", "%": r"\%",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}",
    # After the end of a row, LaTeX reads [...] and * as arguments.
    "[": "{[}", "]": "{]}", "*": "{*}",
    "`": "{`}", "'": "{'}", "\0": "{}",  # no ligatures
    "−": "$-$", "–": "--", "±": r"$\pm$", "×": r"$\times$", "≠": r"$\neq$", "≤": r"$\leq$", "≥": r"$\geq$",
    "…": r"\ldots{}", "→": r"$\rightarrow$", "√": r"$\surd$", "π": r"$\pi$", "σ": r"$\sigma$", "Δ": r"$\Delta$",
}  # fmt: skip
LATEX_OF = str.maketrans(LATEX)
LATEX_ALIGN = {"left": "l", "right": "r"}


def format_csv(table: Table) -> str:
    """Return header and rows as CSV: numbers unrounded, an interval in two columns of its own, no value as nothing.

    Texts that a spreadsheet would evaluate begin with an apostrophe.
    """
    has_interval = [any(_get_interval(row[index]) for row in table.rows) for index in range(len(table.columns))]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        name
        for column, is_wide in zip(table.columns, has_interval, strict=True)
        for name in _name_columns(column, is_wide=is_wide)
    )
    for row in table.rows:
        cells = zip(row, has_interval, strict=True)
        writer.writerow(value for cell, is_wide in cells for value in _list_values(cell, is_wide=is_wide))
    return out.getvalue()


def format_latex(table: Table) -> str:
    r"""Return the table as a LaTeX `table` with rules of the package booktabs, notes below; text is UTF-8."""
    align = "".join(LATEX_ALIGN[column.align] for column in table.columns)
    lines = [r"\begin{table}", r"\centering"]
    lines += [rf"\caption{{{escape_latex(table.title)}}}"] if table.title else []
    lines += [rf"\begin{{tabular}}{{{align}}}", r"\toprule", _format_row(column.header for column in table.columns)]
    lines += [r"\midrule", *(_format_row(row) for row in table.rows), r"\bottomrule", r"\end{tabular}"]
    lines += [rf"\par\footnotesize {escape_latex(note)}" for note in table.notes]
    return "\n".join([*lines, r"\end{table}", ""])


def escape_latex(text: str) -> str:
    """Return a text as LaTeX that prints it."""
    line = " ".join(make_printable(text).split())
    return line.replace("--", "-\0-").replace("--", "-\0-").translate(LATEX_OF)  # "\0" is not printable: none is left


def name_tables(tables: Iterable[Table]) -> dict[str, Table]:
    """Return the tables by names for files: the first words of their titles, numbered if several have the same."""
    named: dict[str, Table] = {}
    for table in tables:
        stem = re.sub(r"[^a-z0-9]+", "_", re.split("[:,]", table.title.lower())[0]).strip("_")[:60] or "table"
        number = 1 + sum(name == stem or re.fullmatch(rf"{stem}_\d+", name) is not None for name in named)
        named[stem if number == 1 else f"{stem}_{number}"] = table
    return named


def write_tables(tables: Iterable[Table], folder: Path) -> list[Path]:
    """Write NAME.csv and NAME.tex for each table; return the files. Raises UsageError if the folder cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--tables {folder}: the folder cannot be created ({error.strerror})") from error
    files = []
    for name, table in name_tables(tables).items():
        for suffix, text in ((".csv", format_csv(table)), (".tex", format_latex(table))):
            files.append(folder / f"{name}{suffix}")
            write_atomically(files[-1], text)
    return files


def _get_interval(cell: str) -> tuple[float, float] | None:
    return cell.interval if isinstance(cell, NumberText) else None


def _name_columns(column: Column, *, is_wide: bool) -> list[str]:
    name = " ".join(column.header.split())
    return [_guard(f"{name}{suffix}") for suffix in (("", " low", " high") if is_wide else ("",))]


def _list_values(cell: str, *, is_wide: bool) -> list[str]:
    if not isinstance(cell, NumberText):
        text = "" if cell == MISSING else _guard(" ".join(make_printable(cell).split()))
        return [text, "", ""] if is_wide else [text]
    interval = [repr(float(bound)) for bound in cell.interval] if cell.interval else ["", ""]
    value = repr(cell.value if isinstance(cell.value, int) else float(cell.value))
    return [value, *interval] if is_wide else [value]


def _guard(text: str) -> str:
    return f"'{text}" if text.startswith(FORMULA) else text


def _format_row(cells: Iterable[str]) -> str:
    return " & ".join(map(escape_latex, cells)) + r" \\"
