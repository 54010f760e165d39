"""The parallel benchmark in tables, in words, as JSON, and as a figure."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from moebench.bench.machine import in_words
from moebench.bench.parallel.measure import ALONE, Benchmark, MeshTimes
from moebench.reporting.canvas import GREY, PALETTE, sheet
from moebench.reporting.formatting import NOTHING, format_count
from moebench.reporting.report import Grid, Report

LEGEND = (
    "over 1 process: tokens per second over those of one process with one thread, paired by round; quartiles.",
    "all-to-all and waiting: shares of a step that was timed, in which every process waits for the slowest before"
    " each exchange; the median step, which gives the tokens per second, is none of these.",
    "sent: by one process in one step, to others. busiest: rows of the process with the most over the mean.",
)


def build_report(bench: Benchmark) -> Report:
    """Return what was measured."""
    return Report(
        grids=tuple(_grid(bench, width) for width in bench.settings.widths),
        notes=(*LEGEND, f"Machine: {in_words(bench.machine)}; one thread for each process unless it says all cores."),
        values=to_values(bench),
    )


def _grid(bench: Benchmark, width: int) -> Grid:
    settings = bench.settings
    return Grid(
        title=f"{settings.batch_size} sequences of 64 tokens, {settings.experts} experts of width {width}",
        header=("mesh", "tokens/s", "over 1 process", "all-to-all", "waiting", "sent MiB", "busiest"),
        rows=tuple(_row(mesh) for mesh in bench.meshes if mesh.width == width),
    )


def _row(mesh: MeshTimes) -> tuple[str, ...]:
    ratio = mesh.over_alone
    return (
        mesh.name,
        format_count(mesh.tokens_per_s.median),
        f"{ratio.median:.2f} ({ratio.low:.2f} … {ratio.high:.2f})",
        _percent(mesh.costs.get("all_to_all_share")),
        _percent(mesh.costs.get("wait_share")),
        NOTHING if not mesh.costs else f"{mesh.costs['sent_mib']:.2f}",
        NOTHING if not mesh.costs else f"{mesh.costs['rank_load_max']:.2f}",
    )


def _percent(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.1f} %"


def to_values(bench: Benchmark) -> dict[str, Any]:
    """Return everything, ready for JSON."""
    return {
        "bench": "parallel",
        "machine": bench.machine,
        "settings": asdict(bench.settings) | {"results": str(bench.settings.results)},
        "meshes": [asdict(mesh) | {"costs": dict(mesh.costs)} for mesh in bench.meshes],
    }


def draw_figure(bench: Benchmark, path: Path) -> Path:
    """Draw the speed over one process on the left, where the time of a timed step goes on the right."""
    names = list(dict.fromkeys(mesh.name for mesh in bench.meshes))
    with sheet(path, "One global batch on several processes", width=11.0, height=1.8 + 0.5 * len(names)) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        _draw_speed(left, bench, names)
        _draw_shares(right, bench, names)
        left.set_yticks(range(len(names)), names)
        left.set_ylim(len(names) - 0.5, -0.5)
    return path


def _draw_speed(ax: Axes, bench: Benchmark, names: list[str]) -> None:
    for index, width in enumerate(bench.settings.widths):
        for mesh in (mesh for mesh in bench.meshes if mesh.width == width):
            place, ratio = names.index(mesh.name) + 0.18 * index, mesh.over_alone
            label = f"experts of width {width}" if mesh.name == ALONE else None
            ax.plot([ratio.low, ratio.high], [place, place], color=PALETTE[index], linewidth=2)
            ax.plot(ratio.median, place, "o", color=PALETTE[index], label=label)
    ax.axvline(1, color=GREY, linewidth=0.9, linestyle="--")
    ax.set_xlabel("tokens per second over 1 process")
    ax.legend(frameon=False, fontsize=8)


def _draw_shares(ax: Axes, bench: Benchmark, names: list[str]) -> None:
    width = bench.settings.widths[-1]
    for mesh in (mesh for mesh in bench.meshes if mesh.width == width and mesh.costs):
        place = names.index(mesh.name)
        transfer, waiting = 100 * mesh.costs["all_to_all_share"], 100 * mesh.costs["wait_share"]
        ax.barh(place, transfer, color=PALETTE[1], height=0.5)
        ax.barh(place, waiting, left=transfer, color="#bbbbbb", height=0.5)
    ax.set_xlabel(f"% of a timed step, width {width}: all-to-all, then waiting (grey)")
