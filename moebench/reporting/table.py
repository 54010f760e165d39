"""One table for every command: the same value prints on a terminal and as Markdown."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

Align = Literal["left", "right"]
MARKDOWN_RULE = {"left": ":--", "right": "--:"}


@dataclass(frozen=True, kw_only=True)
class Column:
    """The header of a column and how its cells are set."""

    header: str
    align: Align = "right"
    wraps: bool = False
    """Cells may break over several lines where the terminal is too narrow; else they are cut with an ellipsis."""
    style: Callable[[str], str] = lambda cell: ""
    """Return the rich style of a cell with this text."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of text cells with a title above and notes below."""

    title: str = ""
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    marked: bool = False
    """The numbers cannot be trusted; `notes` give the reason."""

    def to_rich(self) -> RenderableType:
        """Return the table for a terminal."""
        note_style = "yellow" if self.marked else "dim"
        return Group(self._rich_table(), *(Text(note, style=note_style) for note in self.notes))

    def to_markdown(self) -> str:
        """Return the table as Markdown without a final newline."""
        rules = [MARKDOWN_RULE[column.align] for column in self.columns]
        lines = [
            format_markdown_row(cells) for cells in ([column.header for column in self.columns], rules, *self.rows)
        ]
        title = [f"**{self.title}**", ""] if self.title else []
        notes = ["", *(f"- {note}" for note in self.notes)] if self.notes else []
        return "\n".join([*title, *lines, *notes])

    def to_text(self) -> str:
        """Return header and rows as text, each column as wide as its longest cell, whatever the terminal's width."""
        lines = (tuple(column.header for column in self.columns), *self.rows)
        lines = tuple(tuple(cell if cell.isprintable() else repr(cell)[1:-1] for cell in line) for line in lines)
        widths = [max(map(cell_len, cells)) for cells in zip(*lines, strict=True)]
        aligned = (zip(self.columns, line, widths, strict=True) for line in lines)
        return "\n".join("  ".join(_pad(*cell) for cell in line).rstrip() for line in aligned)

    def _rich_table(self) -> RichTable:
        table = RichTable(
            title=Text(self.title, style="bold yellow" if self.marked else "bold") if self.title else None,
            title_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            show_edge=False,
        )
        for column in self.columns:
            overflow: Literal["fold", "ellipsis"] = "fold" if column.wraps else "ellipsis"
            header = Text(column.header)  # not a string, in which rich would look for markup
            table.add_column(header, justify=column.align, no_wrap=not column.wraps, overflow=overflow)
        for row in self.rows:
            cells = zip(self.columns, row, strict=True)
            table.add_row(*(Text(cell, style=column.style(cell)) for column, cell in cells))
        return table


def _pad(column: Column, cell: str, width: int) -> str:
    padding = " " * (width - cell_len(cell))
    return padding + cell if column.align == "right" else cell + padding


def number_columns(*headers: str) -> tuple[Column, ...]:
    """Return right-aligned columns that never wrap."""
    return tuple(Column(header=header) for header in headers)


def format_markdown_row(cells: Iterable[str]) -> str:
    """Return one row of a Markdown table; pipes in cells are escaped, white space is collapsed."""
    return f"| {' | '.join(' '.join(cell.replace('|', chr(92) + '|').split()) for cell in cells)} |"
