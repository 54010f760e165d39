"""The figure of the layer benchmark: a panel per row, a dot per variant, the dense layer as a line."""

from collections.abc import Sequence
from math import ceil
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from moebench.bench.layer.measure import Benchmark
from moebench.bench.layer.plain import NAME as PLAIN
from moebench.bench.layer.row import CandidateResult, Row
from moebench.bench.layer.variants import DENSE, OURS
from moebench.reporting.canvas import GREY, PALETTE, new_figure

OURS_COLOR, PEER_COLOR = PALETTE[1], PALETTE[2]
TICKS = (0.25, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)
COLUMNS = 2


def draw_figure(bench: Benchmark, path: Path) -> Path:
    """Draw the measured ratios of all rows, without estimates."""
    rows = bench.rows
    columns = min(COLUMNS, len(rows))
    lines = ceil(len(rows) / columns)
    heights = [
        max(len(_select_measured_lines(row)) for row in rows[columns * i : columns * (i + 1)]) for i in range(lines)
    ]
    height = 1.2 + sum(0.55 + 0.2 * number for number in heights)
    with new_figure(
        path, "Time over that of a dense layer of equal FLOPs", width=6.2 * columns, height=height
    ) as figure:
        panels = figure.subplots(lines, columns, squeeze=False, height_ratios=[2.5 + n for n in heights]).ravel()
        for ax, row in zip(panels, rows, strict=False):
            _draw_row(ax, row)
        for ax in panels[len(rows) :]:
            ax.remove()
        caption = "filled: forward and backward, with quartiles; open: forward; line: dense layer = 1; left is faster"
        figure.supxlabel(caption, fontsize=9)
    return path


def _select_measured_lines(row: Row) -> list[CandidateResult]:
    return [line for line in row.lines if line.name != DENSE and not line.approximate]


def _draw_row(ax: Axes, row: Row) -> None:
    lines = _select_measured_lines(row)
    for position, line in enumerate(lines):
        is_reference = line.name == PLAIN or line.name.startswith(DENSE)
        color = OURS_COLOR if line.name.startswith(OURS) else GREY if is_reference else PEER_COLOR
        ax.plot(
            [line.train.low, line.train.high], [position, position], color=color, linewidth=2.2, solid_capstyle="round"
        )
        ax.plot(line.forward.median, position, "o", color=color, markersize=5, markerfacecolor="white")
        ax.plot(line.train.median, position, "o", color=color, markersize=6)
    values = [value for line in lines for value in (line.forward.median, line.train.low, line.train.high)]
    format_ratio_axis(ax, [_format_label(line) for line in lines], values)
    ax.set_title(_format_title(row), loc="left", fontsize=8)


def format_ratio_axis(ax: Axes, labels: Sequence[str], values: Sequence[float]) -> None:
    """Format a logarithmic axis of ratios with a line at 1 and a label for each row of dots."""
    ax.axvline(1.0, color="black", linewidth=1.0, linestyle="--", zorder=1)
    ax.set_yticks(range(len(labels)), labels, fontsize=8)
    ax.set_ylim(len(labels) - 0.4, -0.6)  # the first on top
    ax.set_xscale("log")
    low, high = min([0.9, *values]) / 1.08, max([2.0, *values]) * 1.08
    ax.set_xlim(low, high)
    ax.xaxis.set_major_locator(FixedLocator([tick for tick in TICKS if low <= tick <= high]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.grid(axis="x", color="#e6e6e6", linewidth=0.7)
    ax.tick_params(axis="y", length=0)


def _format_label(line: CandidateResult) -> str:
    return f"{line.name} (drops {100 * line.dropped:.1f} %)" if line.dropped > 0 else line.name


def _format_title(row: Row) -> str:
    is_marked = row.is_busy or not row.is_certified
    return f"{row.problem.shape.sizes}, {row.problem.load}" + (" (BUSY MACHINE)" if is_marked else "")
