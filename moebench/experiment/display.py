"""Shows a running grid: one live display on a terminal, plain lines in a pipe; always on stderr."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from moebench.launch.scheduler import Outcome
from moebench.runs.cell import Cell

LINE_EVERY_S = 20.0
"""Seconds between progress lines of a cell in a pipe."""


def title(cell: Cell) -> str:
    """Return what a cell is called on the screen."""
    return f"{cell.arm} · seed {cell.seed}"


def ending(outcome: Outcome, metric: str) -> str:
    """Return the line of a cell that has ended."""
    value = outcome.metrics.get(metric)
    what = f"{value:.4f} {metric.replace('_', ' ')}" if value is not None else (outcome.error or "")
    return f"{outcome.status:<8} {title(outcome.cell):<28} {what}  ({outcome.seconds:.0f} s)"


class LiveDisplay:
    """A progress bar for the grid and one for each cell that is training."""

    def __init__(self, console: Console, cells: list[Cell], metric: str) -> None:
        self.console = console
        self.metric = metric
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            speed_estimate_period=120,
        )
        self.num_cells, self.num_ended = len(cells), 0
        self.grid = self.bars.add_task("grid", total=sum(cell.config.train.steps for cell in cells), detail="")
        self.of_cell: dict[str, TaskID] = {}

    def __enter__(self) -> "LiveDisplay":
        self._count()
        self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    def on_start(self, cell: Cell) -> None:
        """Add a bar for the cell."""
        self.of_cell[cell.id] = self.bars.add_task(title(cell), total=cell.config.train.steps, detail="starting")

    def on_progress(self, cell: Cell, message: dict[str, Any]) -> None:
        """Move the cell's bar and the grid's."""
        detail = f"loss {message['loss']:.3f}  {message['tokens_per_s']:,.0f} tokens/s"
        self._move(cell, message["step"], detail)

    def on_end(self, outcome: Outcome) -> None:
        """Replace the cell's bar by a line."""
        steps = outcome.cell.config.train.steps
        self._move(outcome.cell, steps if outcome.status == "done" else 0, "")
        self.bars.remove_task(self.of_cell.pop(outcome.cell.id))
        self.num_ended += 1
        self._count()
        self.console.print(ending(outcome, self.metric), highlight=False, markup=False)

    def note(self, text: str) -> None:
        """Print a line above the bars."""
        self.console.print(text, highlight=False, markup=False)

    def _move(self, cell: Cell, step: int, detail: str) -> None:
        bar = self.of_cell[cell.id]
        before = next(task.completed for task in self.bars.tasks if task.id == bar)
        self.bars.update(bar, completed=step, detail=detail)
        self.bars.advance(self.grid, step - before)

    def _count(self) -> None:
        self.bars.update(self.grid, detail=f"cell {self.num_ended}/{self.num_cells}")


class LineDisplay:
    """One line when a cell starts, ends, and now and then between."""

    def __init__(self, console: Console, cells: list[Cell], metric: str) -> None:
        self.console = console
        self.metric = metric
        self.num_cells, self.num_ended = len(cells), 0
        self.said_at: dict[str, float] = {}

    def __enter__(self) -> "LineDisplay":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def on_start(self, cell: Cell) -> None:
        """Say that the cell starts."""
        self.said_at[cell.id] = time.monotonic()
        self.note(f"start    {title(cell)}  {cell.id}")

    def on_progress(self, cell: Cell, message: dict[str, Any]) -> None:
        """Say where the cell is, if the last word is old."""
        now = time.monotonic()
        if now - self.said_at[cell.id] >= LINE_EVERY_S:
            self.said_at[cell.id] = now
            steps = cell.config.train.steps
            self.note(
                f"step     {title(cell):<28} {message['step']}/{steps}  loss {message['loss']:.3f}"
                f"  {message['tokens_per_s']:,.0f} tokens/s"
            )

    def on_end(self, outcome: Outcome) -> None:
        """Say how the cell ended."""
        self.num_ended += 1
        self.note(f"{ending(outcome, self.metric)}  [{self.num_ended}/{self.num_cells}]")

    def note(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
