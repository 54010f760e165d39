"""A report: tables with notes, and the same values with all digits for JSON."""

from dataclasses import dataclass, replace
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from moebench.printable import format_json
from moebench.reporting.table import Table


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a command prints, in three forms."""

    tables: tuple[Table, ...]
    heading: tuple[str, ...] = ()
    """What the tables are of, printed first."""
    caveats: tuple[str, ...] = ()
    """What limits the first table, printed below it."""
    problems: tuple[str, ...] = ()
    """Results that are missing or failed, one line each; those that begin with FAILED are highlighted."""
    notes: tuple[str, ...] = ()
    """What the columns and marks mean, printed last."""
    values: Any
    """The numbers of the tables, unrounded and ready for JSON."""

    def without_details(self, hint: str) -> "Report":
        """Return the report without its detailed tables and its notes, with `hint` as its last line."""
        return replace(self, tables=tuple(table for table in self.tables if not table.is_detail), notes=(hint,))

    def to_rich(self) -> RenderableType:
        """Return the report for a terminal of 80 columns or more."""
        caveats = [Text(line) for line in self.caveats]
        parts: list[RenderableType] = [*map(Text, self.heading), *([Text()] if self.heading else [])]
        parts += [] if self.tables else caveats
        for index, table in enumerate(self.tables):
            parts += [table.to_rich(), *(caveats if index == 0 else []), Text()]
        parts += [Text(line, style="red" if line.startswith("FAILED") else "yellow") for line in self.problems]
        return Group(*parts, *(Text(note, style="dim") for note in self.notes))

    def to_markdown(self) -> str:
        """Return the report as Markdown, ending in a newline."""
        parts = [table.to_markdown() for table in self.tables]
        parts[1:1] = ["\n".join(f"- {line}" for line in self.caveats)]
        parts += ["\n".join(f"- {line}" for line in lines) for lines in (self.problems, self.notes)]
        parts.insert(0, "\n".join(f"- {line}" for line in self.heading))
        return "\n\n".join(part for part in parts if part) + "\n"

    def to_json(self) -> str:
        """Return the values as JSON."""
        return format_json(self.values)
