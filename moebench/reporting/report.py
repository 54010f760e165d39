"""What a benchmark says, once for the terminal, once as Markdown, once as JSON."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table as text: a title, what stands below it, a header and rows; all columns but the first are numbers."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    below: tuple[str, ...] = ()
    marked: bool = False
    """The numbers are not to be trusted; `below` says why."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Tables, notes in plain words, and the same with all digits."""

    grids: tuple[Grid, ...]
    notes: tuple[str, ...]
    values: dict[str, Any]

    def to_rich(self) -> RenderableType:
        """Return it for a terminal of 80 columns or more."""
        parts: list[RenderableType] = []
        for grid in self.grids:
            style = "yellow" if grid.marked else "dim"
            parts += [_rich_grid(grid), *(Text(line, style=style) for line in grid.below), Text()]
        return Group(*parts, *(Text(note, style="dim") for note in self.notes))

    def to_markdown(self) -> str:
        """Return it as Markdown, ending in a newline."""
        parts = []
        for grid in self.grids:
            parts += [_markdown_grid(grid), *(["\n".join(f"- {line}" for line in grid.below)] if grid.below else [])]
        parts.append("\n".join(f"- {note}" for note in self.notes))
        return "\n\n".join(part for part in parts if part) + "\n"

    def to_json(self) -> str:
        """Return everything as one JSON object, numbers unrounded."""
        return json.dumps(self.values, indent=1, ensure_ascii=False, allow_nan=False)


def _rich_grid(grid: Grid) -> Table:
    table = Table(
        title=grid.title,
        title_justify="left",
        title_style="bold yellow" if grid.marked else "bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    for index, name in enumerate(grid.header):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in grid.rows:
        table.add_row(*map(Text, row))
    return table


def _markdown_grid(grid: Grid) -> str:
    lines = [grid.header, ["--:" if index else ":--" for index in range(len(grid.header))], *grid.rows]
    return "\n".join([f"**{grid.title}**", "", *(_markdown_line(line) for line in lines)])


def _markdown_line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
