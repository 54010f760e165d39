"""Show a running grid on stderr: one live display on a terminal, plain lines in a pipe."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from typing_extensions import override

from moebench.launch.containment import Containment
from moebench.launch.scheduler import Display, Outcome
from moebench.reporting.formatting import format_plural
from moebench.runs.cell import Cell

LINE_INTERVAL_S = 20.0
"""Seconds between progress lines of a cell in a pipe."""


def cell_title(cell: Cell) -> str:
    """Return the name of a cell on the screen."""
    return f"{cell.arm} · seed {cell.seed}"


def format_outcome(outcome: Outcome, metric: str) -> str:
    """Return the line for a cell that has ended."""
    value = outcome.metrics.get(metric)
    text = f"{value:.4f} {metric.replace('_', ' ').replace('/', ' ')}" if value is not None else (outcome.error or "")
    if outcome.is_retried:
        text += f"; attempt {outcome.attempts + 1} follows"
    return f"{outcome.status:<8} {cell_title(outcome.cell):<28} {text}  ({outcome.seconds:.0f} s)"


def format_progress(message: Mapping[str, Any]) -> str:
    """Return loss and speed of a step, and how many layers are collapsed if any are."""
    num_collapsed = message.get("num_collapsed", 0)
    alarm = f"  {format_plural(num_collapsed, 'layer')} collapsed" if num_collapsed else ""
    return f"loss {message['loss']:.3f}  {message['tokens_per_s']:,.0f} tokens/s{alarm}"


@contextlib.contextmanager
def open_display(console: Console, cells: list[Cell], metric: str, containment: Containment) -> Iterator[Display]:
    """Yield the display for a console: bars on a terminal, else lines, also where FORCE_COLOR asks for colours.

    One that cannot be opened is replaced by none.
    """
    with contextlib.ExitStack() as stack:
        display: Display = NoDisplay()
        with containment.contain("display"):
            is_live = console.is_terminal and not console.is_dumb_terminal and _is_screen(console)
            opened = (LiveDisplay if is_live else LineDisplay)(console, cells, metric)
            opened.__enter__()
            stack.callback(_close, opened, containment)
            display = opened
        yield display


def _close(display: "LiveDisplay | LineDisplay", containment: Containment) -> None:
    with containment.contain("display"):
        display.__exit__()


def _is_screen(console: Console) -> bool:
    """Return whether the console's file is a terminal."""
    try:
        return bool(console.file.isatty())
    except (AttributeError, ValueError, OSError):
        return False


class NoDisplay(Display):
    """Shows nothing."""

    @override
    def on_start(self, cell: Cell) -> None:
        pass

    @override
    def on_progress(self, cell: Cell, message: dict[str, Any]) -> None:
        pass

    @override
    def on_end(self, outcome: Outcome) -> None:
        pass

    @override
    def note(self, text: str) -> None:
        pass


class LiveDisplay(Display):
    """A progress bar for the grid and one for each cell that is training."""

    def __init__(self, console: Console, cells: list[Cell], metric: str) -> None:
        self.console = console
        self.metric = metric
        self.bars = Progress(
            TextColumn("{task.description}", markup=False),  # labels of arms may contain brackets
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            speed_estimate_period=120,
        )
        self.num_cells, self.num_ended = len(cells), 0
        self.grid_bar = self.bars.add_task("grid", total=sum(cell.config.train.steps for cell in cells), detail="")
        self.cell_bars: dict[str, TaskID] = {}

    def __enter__(self) -> "LiveDisplay":
        self._show_count()
        self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    @override
    def on_start(self, cell: Cell) -> None:
        self.cell_bars[cell.id] = self.bars.add_task(cell_title(cell), total=cell.config.train.steps, detail="starting")

    @override
    def on_progress(self, cell: Cell, message: dict[str, Any]) -> None:
        self._move(cell, message["step"], format_progress(message))

    @override
    def on_end(self, outcome: Outcome) -> None:
        steps = outcome.cell.config.train.steps
        self._move(outcome.cell, steps if outcome.status == "done" else 0, "")
        self.bars.remove_task(self.cell_bars.pop(outcome.cell.id))
        self.num_ended += not outcome.is_retried
        self._show_count()
        self.console.print(format_outcome(outcome, self.metric), highlight=False, markup=False)

    @override
    def note(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)

    def _move(self, cell: Cell, step: int, detail: str) -> None:
        bar = self.cell_bars[cell.id]
        before = next(task.completed for task in self.bars.tasks if task.id == bar)
        self.bars.update(bar, completed=step, detail=detail)
        self.bars.advance(self.grid_bar, step - before)

    def _show_count(self) -> None:
        self.bars.update(self.grid_bar, detail=f"cell {self.num_ended}/{self.num_cells}")


class LineDisplay(Display):
    """A line when a cell starts and ends, and every `LINE_INTERVAL_S` seconds between."""

    def __init__(self, console: Console, cells: list[Cell], metric: str) -> None:
        self.console = console
        self.metric = metric
        self.num_cells, self.num_ended = len(cells), 0
        self.last_line_at: dict[str, float] = {}

    def __enter__(self) -> "LineDisplay":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    @override
    def on_start(self, cell: Cell) -> None:
        self.last_line_at[cell.id] = time.monotonic()
        self.note(f"start    {cell_title(cell)}  {cell.id}")

    @override
    def on_progress(self, cell: Cell, message: dict[str, Any]) -> None:
        now = time.monotonic()
        if now - self.last_line_at.get(cell.id, 0.0) >= LINE_INTERVAL_S:
            self.last_line_at[cell.id] = now
            steps = cell.config.train.steps
            self.note(f"step     {cell_title(cell):<28} {message['step']}/{steps}  {format_progress(message)}")

    @override
    def on_end(self, outcome: Outcome) -> None:
        self.num_ended += not outcome.is_retried
        self.note(f"{format_outcome(outcome, self.metric)}  [{self.num_ended}/{self.num_cells}]")

    @override
    def note(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
