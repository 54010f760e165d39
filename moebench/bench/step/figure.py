"""The figure of the step benchmark: a bar per arm in the parts of a step, and what the trainer adds."""

from pathlib import Path

from matplotlib.axes import Axes

from moebench.bench.step.measure import GOAL, Benchmark
from moebench.bench.step.parts import PARTS
from moebench.reporting.canvas import GREY, PALETTE, new_figure

COLORS = {
    "data": "#999999",
    "embedding, head, loss": PALETTE[6],
    "attention": PALETTE[4],
    "router": PALETTE[2],
    "dispatch, experts": PALETTE[1],
    "dense FFN": PALETTE[5],
    "rest of forward": "#dddddd",
    "backward": "#555555",
    "optimizer, clip": PALETTE[3],
}


def draw_figure(bench: Benchmark, path: Path) -> Path:
    """Draw milliseconds by part on the left, the trainer's overhead with quartiles on the right."""
    height = 2.0 + 0.42 * len(bench.arms)
    with new_figure(path, f"A training step: {bench.name}", width=11.0, height=height) as figure:
        left, right = figure.subplots(1, 2, width_ratios=[2.2, 1], sharey=True)
        _draw_parts(left, bench)
        _draw_overhead(right, bench)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return path


def _draw_parts(ax: Axes, bench: Benchmark) -> None:
    starts = [0.0] * len(bench.arms)
    for part in PARTS:
        widths = [1e3 * arm.parts[part] for arm in bench.arms]
        if any(widths):
            ax.barh(range(len(widths)), widths, left=starts, color=COLORS[part], label=part, height=0.62)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    ax.set_yticks(range(len(bench.arms)), [arm.arm for arm in bench.arms])
    ax.set_ylim(len(bench.arms) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("milliseconds of a plain step, with timers")


def _draw_overhead(ax: Axes, bench: Benchmark) -> None:
    for position, arm in enumerate(bench.arms):
        low, high = 100 * arm.overhead.low, 100 * arm.overhead.high
        ax.plot([low, high], [position, position], color=PALETTE[1], linewidth=2.2, solid_capstyle="round")
        ax.plot(100 * arm.overhead.median, position, "o", color=PALETTE[1])
    ax.axvline(0, color=GREY, linewidth=0.9, linestyle="--")
    ax.axvline(100 * GOAL, color=PALETTE[2], linewidth=0.9, linestyle=":")
    ax.margins(x=0.12)
    ax.set_xlabel("trainer adds, % (dotted: goal at 100 ms)")
