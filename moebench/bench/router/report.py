"""The router benchmark in tables of ratios, in words, as JSON and as a figure."""

from dataclasses import asdict
from math import ceil
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from moebench.bench.layer.figure import as_ratios
from moebench.bench.layer.report import quartiles, ratio, rounds_in_words, rounds_values
from moebench.bench.machine import in_words
from moebench.bench.router.measure import D_MODEL, Benchmark, Line, SizeResult
from moebench.reporting.canvas import GREY, PALETTE, sheet
from moebench.reporting.formatting import NOTHING
from moebench.reporting.report import Grid, Report

HEADER = ("router", "k", "grows as", "fwd", "fwd+bwd", "quartiles", "goal")
LEGEND = (
    "fwd, fwd+bwd: time of routing with the router's losses over that of `top_k` with as many experts per token in the"
    " same round, median over rounds, lower is better. Both in training mode; fwd is without gradients, fwd+bwd has"
    " those of the tokens and of the router. The row `top_k` is timed against itself: as far as its ratio is from 1,"
    " the others are not to be trusted.",
    "goal: at most so many times top-k's fwd+bwd: 3 for routers that grow as T·E, 8 for sinkhorn, 30 for base; NO:"
    " it takes more.",
)


def build_report(bench: Benchmark) -> Report:
    """Return what was measured."""
    return Report(
        grids=tuple(_grid(table) for table in bench.tables),
        notes=(*LEGEND, f"Machine: {in_words(bench.machine)}."),
        values=to_values(bench),
    )


def _grid(table: SizeResult) -> Grid:
    missed = [line.name for line in table.lines if line.reaches_goal is False]
    optimum = [f"{x.name} {x.share_of_optimum:.2%}" for x in table.lines if x.share_of_optimum is not None]
    below = [
        f"goal missed: {', '.join(missed) or 'by none'}",
        *([f"share of the best assignment's gain over a random one: {', '.join(optimum)}"] if optimum else []),
        *(f"not measured: {name}: {reason}" for name, reason in table.skipped.items()),
        f"fwd: {rounds_in_words(table.forward_rounds)}",
        f"fwd+bwd: {rounds_in_words(table.train_rounds)}",
    ]
    return Grid(
        title=f"T{table.num_tokens} E{table.num_experts} d{D_MODEL}",
        header=HEADER,
        rows=tuple(_cells(line) for line in table.lines),
        below=tuple(below),
        marked=table.busy,
    )


def _cells(line: Line) -> tuple[str, ...]:
    return (
        line.name,
        str(line.top_k),
        line.cost,
        ratio(line.forward.median),
        ratio(line.train.median),
        quartiles(line.train),
        NOTHING if line.goal is None else f"{line.goal:g}" if line.reaches_goal else f"{line.goal:g} NO",
    )


def to_values(bench: Benchmark) -> dict[str, Any]:
    """Return everything, ready for JSON."""
    return {
        "bench": "router",
        "machine": bench.machine,
        "settings": asdict(bench.settings),
        "tables": [
            {
                "num_tokens": table.num_tokens,
                "num_experts": table.num_experts,
                "d_model": D_MODEL,
                "lines": [asdict(line) | {"reaches_goal": line.reaches_goal} for line in table.lines],
                "skipped": dict(table.skipped),
                "rounds": {
                    "forward": rounds_values(table.forward_rounds),
                    "train": rounds_values(table.train_rounds),
                },
            }
            for table in bench.tables
        ],
    }


def draw_figure(bench: Benchmark, path: Path) -> Path:
    """Draw the ratios, a panel for each table; a bar marks a goal."""
    columns = min(2, len(bench.tables))
    lines = ceil(len(bench.tables) / columns)
    height = 1.2 + lines * (0.6 + 0.17 * max(len(table.lines) for table in bench.tables))
    with sheet(path, "Time of routing over that of top-k", width=5.6 * columns, height=height) as figure:
        panels = figure.subplots(lines, columns, squeeze=False).ravel()
        for ax, table in zip(panels, bench.tables, strict=False):
            _draw_table(ax, table)
        for ax in panels[len(bench.tables) :]:
            ax.remove()
        words = "filled: forward and backward, with quartiles; open: forward; bar: goal; line: top-k = 1"
        figure.supxlabel(words, fontsize=9)
    return path


def _draw_table(ax: Axes, table: SizeResult) -> None:
    for place, line in enumerate(table.lines):
        color = PALETTE[2] if line.reaches_goal is False else PALETTE[1]
        ax.plot([line.train.low, line.train.high], [place, place], color=color, linewidth=2.2, solid_capstyle="round")
        ax.plot(line.forward.median, place, "o", color=color, markersize=4, markerfacecolor="white")
        ax.plot(line.train.median, place, "o", color=color, markersize=5)
        if line.goal is not None:
            ax.plot(line.goal, place, "|", color=GREY, markersize=8)
    values = [value for line in table.lines for value in (line.forward.median, line.train.low, line.train.high)]
    as_ratios(ax, [line.name for line in table.lines], [*values, *(line.goal or 1.0 for line in table.lines)])
    busy = " (BUSY MACHINE)" if table.busy else ""
    ax.set_title(f"{table.num_tokens:,} tokens, {table.num_experts} experts{busy}", loc="left", fontsize=8)
