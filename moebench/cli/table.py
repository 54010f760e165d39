"""Tables on the terminal, with a rule under the head only, so that 80 columns are enough."""

from collections.abc import Collection, Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Collection[str] = (), whole: Collection[str] = ()
) -> None:
    """Print rows under their columns; columns in `right` are right-aligned, those in `whole` are never wrapped."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for column in columns:
        table.add_column(
            column, justify="right" if column in right else "left", no_wrap=column in whole, overflow="fold"
        )
    for row in rows:
        table.add_row(*row)
    Console().print(table, markup=False)
