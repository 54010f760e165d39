"""Tables and reports on the terminal, as Markdown or as JSON."""

import sys
import time
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from moebench.printable import print_text

if TYPE_CHECKING:
    from rich.console import Console

    from moebench.reporting.report import Report


def make_console(*, stderr: bool = False) -> "Console":
    """Return a console that prints text as it is; with NO_COLOR (no-color.org) neither colors nor bold."""
    from moebench.reporting.console import SafeConsole
    from moebench.reporting.streams import open_stderr_console

    return open_stderr_console() if stderr else SafeConsole()


PROGRESS_EVERY_S = 2.0
"""Seconds between lines of progress; a command that is faster prints none."""

MAX_FITTED_ROWS = 1000
"""Longer tables are not fitted to the terminal, which would take milliseconds for each row."""


class Progress(Protocol):
    """Shows a number and a total, after the name of what they are of."""

    def __call__(self, number: int, total: int, subject: str = "") -> None:
        """Print both on standard error, once in a while."""


def print_progress(what: str) -> Progress:
    """Return a function of a number and a total that prints both on standard error, once in a while."""
    printed_at = time.monotonic()

    def show(number: int, total: int, subject: str = "") -> None:
        nonlocal printed_at
        if time.monotonic() - printed_at >= PROGRESS_EVERY_S:
            printed_at = time.monotonic()
            prefix = f"{subject}: " if subject else ""
            print_text(f"{prefix}{number:,} of {total:,} {what}", file=sys.stderr)

    return show


def print_table(
    headers: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Collection[str] = (),
    no_wrap: Collection[str] = (),
    keys: Collection[str] = (),
    markdown: bool = False,
) -> None:
    """Print rows under their headers; `right`, `no_wrap`: headers of the columns that are aligned so or never wrap.

    `keys`: headers of the columns that name a row, by default the first: where the terminal is narrow, they are
    repeated in each part of the table.
    """
    from moebench.reporting.table import Column, Table

    columns = (
        Column(
            header=header,
            align="right" if header in right else "left",
            wraps=header not in no_wrap,
            is_key=header in keys,
        )
        for header in headers
    )
    table = Table(columns=tuple(columns), rows=tuple(tuple(row) for row in rows))
    if markdown:
        print_text(table.to_markdown())
    elif len(table.rows) > MAX_FITTED_ROWS:
        print_text(table.to_text())
    else:
        make_console().print(table.to_rich())


def print_report(report: "Report", *, json: bool, markdown: bool) -> None:
    """Print a report as JSON, as Markdown or for the terminal."""
    if json:
        print_text(report.to_json())
    elif markdown:
        print_text(report.to_markdown())
    else:
        make_console().print(report.to_rich())
