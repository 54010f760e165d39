"""One table for every command: the same value prints on a terminal and as Markdown."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
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
    """Cells may break between words where the terminal is narrow."""
    is_key: bool = False
    """Names the row: repeated in each part of a table that is too wide. Without any, the first column is."""
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
    is_detail: bool = False
    """A report without details leaves it out."""

    def to_rich(self) -> RenderableType:
        """Return the table for a terminal."""
        note_style = "yellow" if self.marked else "dim"
        # Not the title of rich's table, which is wrapped at the width of the table.
        title = [Text(self.title, style="bold yellow" if self.marked else "bold")] if self.title else []
        return Group(*title, _FittedTable(self), *(Text(note, style=note_style) for note in self.notes))

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
        widths = [max(map(cell_len, cells)) for cells in zip(*lines, strict=True)]
        aligned = (zip(self.columns, line, widths, strict=True) for line in lines)
        return "\n".join("  ".join(_pad(*cell) for cell in line).rstrip() for line in aligned)

    def fit_columns(self, width: int) -> list[int] | None:
        """Return the width of each column in a terminal of `width` cells; None if one would lose characters.

        Numbers are as wide as they are; the last columns of words, such as verdicts, break last.
        """
        texts = [(column.header, *(row[index] for row in self.rows)) for index, column in enumerate(self.columns)]
        natural = [_measure(line for cell in cells for line in cell.splitlines()) for cells in texts]
        least = [
            _measure(word for cell in cells for word in cell.split()) if column.wraps else full
            for column, cells, full in zip(self.columns, texts, natural, strict=True)
        ]
        spare = width - sum(least) - 2 * len(least) + 1  # padding of each column, and a space between two
        if spare < 0:
            return None
        for index in reversed(range(len(least))):
            extra = min(natural[index] - least[index], spare)
            least[index] += extra
            spare -= extra
        return least

    def split(self, width: int) -> list["Table"] | None:
        """Return the fewest tables of the same rows that fit a terminal of `width` cells, each with the key columns.

        None if the key columns and one other are too wide already.
        """
        keys = [index for index, column in enumerate(self.columns) if column.is_key] or [0]
        parts: list[list[int]] = []
        for index in range(len(self.columns)):
            if index in keys:
                continue
            wider = [*parts[-1], index] if parts else [index]
            if parts and self._select([*keys, *wider]).fit_columns(width):
                parts[-1] = wider
            elif self._select([*keys, index]).fit_columns(width):
                parts.append([index])
            else:
                return None
        return [self._select([*keys, *part]) for part in parts] or None

    def _select(self, indices: Sequence[int]) -> "Table":
        """Return the rows with these columns alone, in the order of the table."""
        ordered = sorted(indices)
        rows = tuple(tuple(row[index] for index in ordered) for row in self.rows)
        return Table(columns=tuple(self.columns[index] for index in ordered), rows=rows)

    def build_rich_table(self, widths: Sequence[int]) -> RichTable:
        """Return the table with columns of these widths."""
        table = RichTable(
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            show_edge=False,
        )
        for column, width in zip(self.columns, widths, strict=True):
            overflow: Literal["fold", "ellipsis"] = "fold" if column.wraps else "ellipsis"
            header = Text(column.header)  # not a string, in which rich would look for markup
            table.add_column(header, justify=column.align, no_wrap=not column.wraps, overflow=overflow, width=width)
        for row in self.rows:
            cells = zip(self.columns, row, strict=True)
            table.add_row(*(Text(cell, style=column.style(cell)) for column, cell in cells))
        return table


@dataclass(frozen=True)
class _FittedTable:
    """A table where the terminal is wide enough for every column, else several, else its rows one value per line."""

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widths = self.table.fit_columns(options.max_width)
        if widths is not None:
            yield self.table.build_rich_table(widths)
            return
        parts = self.table.split(options.max_width)
        if parts is not None:
            yield from (_FittedTable(part) for part in parts)
            return
        first, *others = self.table.columns
        for row in self.table.rows:
            yield Text(f"{first.header} {row[0]}".strip(), style="bold", overflow="fold")
            for column, cell in zip(others, row[1:], strict=True):
                heading = " ".join(column.header.split())
                yield Text.assemble(f"  {heading}: ", (" ".join(cell.split()), column.style(cell)), overflow="fold")


def _measure(texts: Iterable[str]) -> int:
    return max(map(cell_len, texts), default=0)


def _pad(column: Column, cell: str, width: int) -> str:
    padding = " " * (width - cell_len(cell))
    return padding + cell if column.align == "right" else cell + padding


def number_columns(*headers: str) -> tuple[Column, ...]:
    """Return right-aligned columns that never wrap."""
    return tuple(Column(header=header) for header in headers)


def format_markdown_row(cells: Iterable[str]) -> str:
    """Return one row of a Markdown table; pipes in cells are escaped, white space is collapsed."""
    return f"| {' | '.join(' '.join(cell.replace('|', chr(92) + '|').split()) for cell in cells)} |"
