"""Tables and reports on the terminal, as Markdown or as JSON."""

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

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
    from rich.console import Console

    from moebench.reporting.table import Column, Table

    columns = (
        Column(header=header, align="right" if header in right else "left", wraps=header not in no_wrap)
        for header in headers
    )
    table = Table(columns=tuple(columns), rows=tuple(tuple(row) for row in rows))
    if markdown:
        print(table.to_markdown())
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
