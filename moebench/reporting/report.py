"""A report: tables with notes, and the same values with all digits for JSON."""

import json
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from moebench.reporting.table import Table


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a command prints, in three forms."""

    tables: tuple[Table, ...]
    problems: tuple[str, ...] = ()
    """Results that are missing or failed, one line each; those that begin with FAILED are highlighted."""
    notes: tuple[str, ...] = ()
    values: Any
    """The numbers of the tables, unrounded and ready for JSON."""

    def to_rich(self) -> RenderableType:
        """Return the report for a terminal of 80 columns or more."""
        parts: list[RenderableType] = []
        for table in self.tables:
            parts += [table.to_rich(), Text()]
        parts += [Text(line, style="red" if line.startswith("FAILED") else "yellow") for line in self.problems]
        return Group(*parts, *(Text(note, style="dim") for note in self.notes))

    def to_markdown(self) -> str:
        """Return the report as Markdown, ending in a newline."""
        parts = [table.to_markdown() for table in self.tables]
        parts += ["\n".join(f"- {line}" for line in lines) for lines in (self.problems, self.notes)]
        return "\n\n".join(part for part in parts if part) + "\n"

    def to_json(self, *, ascii_only: bool = False) -> str:
        """Return the values as JSON; `ascii_only`: with other characters escaped."""
        return json.dumps(self.values, indent=1, ensure_ascii=ascii_only)
