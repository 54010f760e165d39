"""The report and the figure of the router benchmark."""

from dataclasses import asdict
from math import ceil
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from moebench.bench.layer.figure import format_ratio_axis
from moebench.bench.machine import describe_machine
from moebench.bench.rounds import describe_rounds, format_quartiles, format_ratio, rounds_to_dict
from moebench.bench.router.measure import D_MODEL, Benchmark, RouterResult, SizeResult
from moebench.reporting.canvas import GREY, PALETTE, new_figure
from moebench.reporting.formatting import MISSING
from moebench.reporting.report import Report
from moebench.reporting.table import Column, Table, number_columns

HEADERS = ("k", "grows as", "fwd", "fwd+bwd", "quartiles", "goal")
LEGEND = (
    "fwd, fwd+bwd: time of routing with the router's losses over that of `top_k` with as many experts per token in the"
    " same round, median over rounds, lower is better. Both in training mode; fwd is without gradients, fwd+bwd has"
    " those of the tokens and of the router. The row `top_k` is timed against itself: its distance from 1 is the"
    " error of the others.",
    "goal: at most so many times top-k's fwd+bwd: 3 for routers that grow as T·E, 8 for sinkhorn, 30 for base; NO:"
    " it takes more.",
)


def build_report(bench: Benchmark) -> Report:
    """Return the report of a measured benchmark."""
    return Report(
        tables=tuple(_size_table(result) for result in bench.tables),
        notes=(*LEGEND, f"Machine: {describe_machine(bench.machine)}."),
        values=_to_dict(bench),
    )


def _size_table(result: SizeResult) -> Table:
    missed = [line.name for line in result.lines if line.reaches_goal is False]
    optimum = [f"{x.name} {x.share_of_optimum:.2%}" for x in result.lines if x.share_of_optimum is not None]
    notes = [
        f"goal missed: {', '.join(missed) or 'by none'}",
        *([f"share of the best assignment's gain over a random one: {', '.join(optimum)}"] if optimum else []),
        *(f"not measured: {name}: {reason}" for name, reason in result.skipped.items()),
        f"fwd: {describe_rounds(result.forward_rounds)}",
        f"fwd+bwd: {describe_rounds(result.train_rounds)}",
    ]
    return Table(
        title=f"T{result.num_tokens} E{result.num_experts} d{D_MODEL}",
        columns=(Column(header="router", align="left"), *number_columns(*HEADERS)),
        rows=tuple(_cells(line) for line in result.lines),
        notes=tuple(notes),
        marked=result.is_busy,
    )


def _cells(line: RouterResult) -> tuple[str, ...]:
    return (
        line.name,
        str(line.top_k),
        line.cost,
        format_ratio(line.forward.median),
        format_ratio(line.train.median),
        format_quartiles(line.train),
        MISSING if line.goal is None else f"{line.goal:g}" if line.reaches_goal else f"{line.goal:g} NO",
    )


def _to_dict(bench: Benchmark) -> dict[str, Any]:
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
                    "forward": rounds_to_dict(table.forward_rounds),
                    "train": rounds_to_dict(table.train_rounds),
                },
            }
            for table in bench.tables
        ],
    }


def draw_figure(bench: Benchmark, path: Path) -> Path:
    """Draw the ratios, one panel for each table; bars are goals."""
    columns = min(2, len(bench.tables))
    lines = ceil(len(bench.tables) / columns)
    height = 1.2 + lines * (0.6 + 0.17 * max(len(table.lines) for table in bench.tables))
    with new_figure(path, "Time of routing over that of top-k", width=5.6 * columns, height=height) as figure:
        panels = figure.subplots(lines, columns, squeeze=False).ravel()
        for ax, table in zip(panels, bench.tables, strict=False):
            _draw_table(ax, table)
        for ax in panels[len(bench.tables) :]:
            ax.remove()
        caption = "filled: forward and backward, with quartiles; open: forward; bar: goal; line: top-k = 1"
        figure.supxlabel(caption, fontsize=9)
    return path


def _draw_table(ax: Axes, table: SizeResult) -> None:
    for position, line in enumerate(table.lines):
        color = PALETTE[2] if line.reaches_goal is False else PALETTE[1]
        ax.plot(
            [line.train.low, line.train.high], [position, position], color=color, linewidth=2.2, solid_capstyle="round"
        )
        ax.plot(line.forward.median, position, "o", color=color, markersize=4, markerfacecolor="white")
        ax.plot(line.train.median, position, "o", color=color, markersize=5)
        if line.goal is not None:
            ax.plot(line.goal, position, "|", color=GREY, markersize=8)
    values = [value for line in table.lines for value in (line.forward.median, line.train.low, line.train.high)]
    format_ratio_axis(ax, [line.name for line in table.lines], [*values, *(line.goal or 1.0 for line in table.lines)])
    busy = " (BUSY MACHINE)" if table.is_busy else ""
    ax.set_title(f"{table.num_tokens:,} tokens, {table.num_experts} experts{busy}", loc="left", fontsize=8)
