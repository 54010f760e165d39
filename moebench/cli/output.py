"""Tables and reports on the terminal, as Markdown or as JSON."""

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from moebench.printable import print_text

if TYPE_CHECKING:
    from rich.console import Console

    from moebench.reporting.report import Report


def make_console(*, stderr: bool = False) -> "Console":
    """Return a console that prints text as it is; with NO_COLOR (no-color.org) neither colors nor bold."""
    from moebench.reporting.console import SafeConsole
    from moebench.reporting.streams import open_stderr_console

    return open_stderr_console() if stderr else SafeConsole()


def print_table(
    headers: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Collection[str] = (),
    no_wrap: Collection[str] = (),
    markdown: bool = False,
) -> None:
    """Print rows under their headers; `right`, `no_wrap`: headers of the columns that are aligned so or never wrap."""
    from moebench.reporting.table import Column, Table

    columns = (
        Column(header=header, align="right" if header in right else "left", wraps=header not in no_wrap)
        for header in headers
    )
    table = Table(columns=tuple(columns), rows=tuple(tuple(row) for row in rows))
    if markdown:
        print_text(table.to_markdown())
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
