"""The report and the figure of the parallel benchmark."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from moebench.bench.machine import describe_machine
from moebench.bench.parallel.measure import SINGLE, Benchmark, MeshTimes
from moebench.reporting.canvas import GREY, PALETTE, new_figure
from moebench.reporting.metrics import explain_metrics, format_metric, metric_headers
from moebench.reporting.report import Report
from moebench.reporting.table import Column, Table, number_columns

COSTS = (
    "all_to_all_share",
    "wait_share",
    "sent_mib",
    "collectives",
    "collective_mib",
    "optimizer_mib",
    "rank_load_max",
)
METRIC_NAMES = tuple(f"parallel/{name}" for name in COSTS)
LEGEND = (
    "over 1 process: tokens per second over those of one process with one thread, paired by round; quartiles.",
    f"{explain_metrics(*METRIC_NAMES)} The median step, which gives the tokens per second, is not a timed one.",
)


def build_report(bench: Benchmark) -> Report:
    """Return the report of a measured benchmark."""
    machine = describe_machine(bench.machine)
    return Report(
        tables=tuple(_width_table(bench, width) for width in bench.settings.widths),
        notes=(*LEGEND, f"Machine: {machine}; one thread for each process unless it says all cores."),
        values=_to_dict(bench),
    )


def _width_table(bench: Benchmark, width: int) -> Table:
    settings = bench.settings
    headers = (*metric_headers("tokens_per_s"), "over 1 process", *metric_headers(*METRIC_NAMES))
    return Table(
        title=f"{settings.batch_size} sequences of 64 tokens, {settings.experts} experts of width {width}",
        columns=(Column(header="mesh", align="left"), *number_columns(*headers)),
        rows=tuple(_row(mesh) for mesh in bench.meshes if mesh.width == width),
    )


def _row(mesh: MeshTimes) -> tuple[str, ...]:
    ratio = mesh.over_alone
    return (
        mesh.name,
        format_metric("tokens_per_s", mesh.tokens_per_s.median),
        f"{ratio.median:.2f} ({ratio.low:.2f} … {ratio.high:.2f})",
        *(format_metric(f"parallel/{name}", mesh.costs.get(name)) for name in COSTS),
    )


def _to_dict(bench: Benchmark) -> dict[str, Any]:
    return {
        "bench": "parallel",
        "machine": bench.machine,
        "settings": asdict(bench.settings),
        "meshes": [asdict(mesh) | {"costs": dict(mesh.costs)} for mesh in bench.meshes],
    }


def draw_figure(bench: Benchmark, path: Path) -> Path:
    """Draw the speed over one process on the left, where the time of a timed step goes on the right."""
    names = list(dict.fromkeys(mesh.name for mesh in bench.meshes))
    with new_figure(path, "One global batch on several processes", width=11.0, height=1.8 + 0.5 * len(names)) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        _draw_speed(left, bench, names)
        _draw_shares(right, bench, names)
        left.set_yticks(range(len(names)), names)
        left.set_ylim(len(names) - 0.5, -0.5)
    return path


def _draw_speed(ax: Axes, bench: Benchmark, names: list[str]) -> None:
    for index, width in enumerate(bench.settings.widths):
        for mesh in (mesh for mesh in bench.meshes if mesh.width == width):
            position, ratio = names.index(mesh.name) + 0.18 * index, mesh.over_alone
            label = f"experts of width {width}" if mesh.name == SINGLE else None
            ax.plot([ratio.low, ratio.high], [position, position], color=PALETTE[index], linewidth=2)
            ax.plot(ratio.median, position, "o", color=PALETTE[index], label=label)
    ax.axvline(1, color=GREY, linewidth=0.9, linestyle="--")
    ax.set_xlabel("tokens per second over 1 process")
    ax.legend(frameon=False, fontsize=8)


def _draw_shares(ax: Axes, bench: Benchmark, names: list[str]) -> None:
    width = bench.settings.widths[-1]
    for mesh in (mesh for mesh in bench.meshes if mesh.width == width and mesh.costs):
        position = names.index(mesh.name)
        transfer, waiting = 100 * mesh.costs["all_to_all_share"], 100 * mesh.costs["wait_share"]
        ax.barh(position, transfer, color=PALETTE[1], height=0.5)
        ax.barh(position, waiting, left=transfer, color="#bbbbbb", height=0.5)
    ax.set_xlabel(f"% of a timed step, width {width}: all-to-all, then waiting (grey)")
