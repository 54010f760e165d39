"""The figure of expert load: how evenly the tokens of each layer spread over its experts."""

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from moebench.analysis.compare.statistics import Values
from moebench.reporting.canvas import PALETTE, sheet

NORMAL, OVERLOADED = PALETTE[1], PALETTE[2]


def draw_load(load_by_layer: Mapping[str, Sequence[int]], *, path: Path, title: str) -> Path:
    """Draw the share of assignments of each expert, one panel per layer, with the line of an even load 1/E.

    Raises ValueError when there is no layer.
    """
    if not load_by_layer:
        raise ValueError("no expert layer to draw: the load is empty")
    columns = min(len(load_by_layer), 3)
    rows = ceil(len(load_by_layer) / columns)
    with sheet(path, title, width=max(3.6 * columns, 6.0), height=1.1 + 2.0 * rows) as figure:
        axes = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
        for ax, (layer, load) in zip(axes, load_by_layer.items(), strict=False):
            _draw_layer(ax, layer, np.asarray(load, dtype=np.float64))
        for ax in axes[len(load_by_layer) :]:
            ax.remove()
        figure.supylabel("share of assignments", fontsize=9)
        figure.supxlabel("expert (dashed: even load 1/E; orange: more than twice that; ×: no token)", fontsize=9)
    return path


def _draw_layer(ax: Axes, layer: str, load_E: Values) -> None:
    """Draw the bars of one layer; experts without a token are crossed, for a bar of no height is not seen."""
    total = float(load_E.sum())
    share_E = load_E / total if total else load_E
    expert_E = np.arange(len(load_E))
    even = 1 / len(load_E)
    ax.bar(expert_E, share_E, width=0.85, color=[OVERLOADED if x > 2 * even else NORMAL for x in share_E])
    ax.axhline(even, color="black", linewidth=0.9, linestyle="--")
    dead_E = expert_E[load_E == 0]
    if len(dead_E):  # an empty line that is not clipped would break the layout
        ax.plot(dead_E, np.zeros(len(dead_E)), "x", color=OVERLOADED, markersize=5, clip_on=False, zorder=4)
    busiest = f"busiest {share_E.max() / even:.1f} × even" if total else "no token at all"
    dead = f", {len(dead_E)} dead" if len(dead_E) else ""
    ax.set_title(f"layer {layer}: {busiest}{dead}", loc="left", fontsize=8.5)
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g} %"))
