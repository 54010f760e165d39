"""Tables and reports on the terminal, as Markdown or as JSON."""

import sys
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moebench.reporting.report import Report


PROGRESS_EVERY_S = 2.0
"""Seconds between lines of progress; a command that is faster prints none."""

MAX_FITTED_ROWS = 1000
"""Longer tables are not fitted to the terminal, which would take milliseconds for each row."""


def print_progress(what: str) -> Callable[[int, int], None]:
    """Return a function of a number and a total that prints both on standard error, once in a while."""
    printed_at = time.monotonic()

    def show(number: int, total: int) -> None:
        nonlocal printed_at
        if time.monotonic() - printed_at >= PROGRESS_EVERY_S:
            printed_at = time.monotonic()
            print(f"{number:,} of {total:,} {what}", file=sys.stderr, flush=True)

    return show


def print_table(
    headers: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Collection[str] = (),
    no_wrap: Collection[str] = (),
    markdown: bool = False,
) -> None:
    """Print rows under their headers; `right`, `no_wrap`: headers of the columns that are aligned so or never wrap."""
    from rich.console import Console

    from moebench.reporting.table import Column, Table

    columns = (
        Column(header=header, align="right" if header in right else "left", wraps=header not in no_wrap)
        for header in headers
    )
    table = Table(columns=tuple(columns), rows=tuple(tuple(row) for row in rows))
    if markdown:
        print(table.to_markdown())
    elif len(table.rows) > MAX_FITTED_ROWS:
        print(table.to_text())
    else:
        Console().print(table.to_rich())


def print_report(report: "Report", *, json: bool, markdown: bool) -> None:
    """Print a report as JSON, as Markdown or for the terminal."""
    if json:
        print(report.to_json())
    elif markdown:
        print(report.to_markdown())
    else:
        from rich.console import Console

        Console().print(report.to_rich())
