"""Tables and reports on the terminal, as Markdown or as JSON."""

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from moebench.printable import print_text

if TYPE_CHECKING:
    from moebench.reporting.report import Report


def print_table(
    headers: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Collection[str] = (),
    no_wrap: Collection[str] = (),
    markdown: bool = False,
) -> None:
    """Print rows under their headers; `right`, `no_wrap`: headers of the columns that are aligned so or never wrap."""
    from moebench.reporting.console import SafeConsole
    from moebench.reporting.table import Column, Table

    columns = (
        Column(header=header, align="right" if header in right else "left", wraps=header not in no_wrap)
        for header in headers
    )
    table = Table(columns=tuple(columns), rows=tuple(tuple(row) for row in rows))
    if markdown:
        print_text(table.to_markdown())
    else:
        SafeConsole().print(table.to_rich())


def print_report(report: "Report", *, json: bool, markdown: bool) -> None:
    """Print a report as JSON, as Markdown or for the terminal."""
    if json:
        print_text(report.to_json())
    elif markdown:
        print_text(report.to_markdown())
    else:
        from moebench.reporting.console import SafeConsole

        SafeConsole().print(report.to_rich())
