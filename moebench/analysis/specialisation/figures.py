"""Figures of one run: the load of every expert, and which experts take more of a label than of all tokens."""

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, MaxNLocator
from torch import Tensor

from moebench.analysis.statistics import Values
from moebench.reporting.canvas import GREY, PALETTE, new_figure
from moebench.routing.metrics import label_parts
from moebench.training.label_tables import LabelTable

NORMAL, OVERLOADED = PALETTE[1], PALETTE[2]
MAX_LABELS = 16
"""Labels drawn of one kind; of more, those with the most information."""
MAX_LAYERS = 6
"""Layers drawn; of more, evenly spaced ones with the first and the last."""
MAX_NAME_LENGTH = 20
MAX_LOG2_RATIO = 3.0
"""Range of the colours in powers of two: an eighth to eight times."""


def draw_load(load_by_layer: Mapping[str, Sequence[int]], *, path: Path, title: str) -> Path:
    """Draw the share of assignments of each expert, one panel per layer, with the line of an even load 1/E.

    Raises ValueError when there is no layer.
    """
    if not load_by_layer:
        raise ValueError("no expert layer to draw: the load is empty")
    columns = min(len(load_by_layer), 3)
    rows = ceil(len(load_by_layer) / columns)
    with new_figure(path, title, width=max(3.6 * columns, 6.0), height=1.1 + 2.0 * rows) as figure:
        axes = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
        for ax, (layer, load) in zip(axes, load_by_layer.items(), strict=False):
            _draw_layer_load(ax, layer, np.asarray(load, dtype=np.float64))
        for ax in axes[len(load_by_layer) :]:
            ax.remove()
        figure.supylabel("share of assignments", fontsize=9)
        figure.supxlabel("expert (dashed: even load 1/E; orange: more than twice that; ×: no token)", fontsize=9)
    return path


def _draw_layer_load(ax: Axes, layer: str, load_E: Values) -> None:
    """Draw the bars of one layer, with a cross for experts without a token, whose bars have no height."""
    total = float(load_E.sum())
    share_E = load_E / total if total else load_E
    expert_E = np.arange(len(load_E))
    even = 1 / len(load_E)
    ax.bar(expert_E, share_E, width=0.85, color=[OVERLOADED if x > 2 * even else NORMAL for x in share_E])
    ax.axhline(even, color="black", linewidth=0.9, linestyle="--")
    dead_E = expert_E[load_E == 0]
    if len(dead_E):  # an unclipped empty line would break the layout
        ax.plot(dead_E, np.zeros(len(dead_E)), "x", color=OVERLOADED, markersize=5, clip_on=False, zorder=4)
    busiest = f"busiest {share_E.max() / even:.1f} × even" if total else "no token at all"
    dead = f", {len(dead_E)} dead" if len(dead_E) else ""
    ax.set_title(f"layer {layer}: {busiest}{dead}", loc="left", fontsize=8.5)
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g} %"))


def find_informative_labels(tables: Sequence[Tensor], num_labels: int = MAX_LABELS) -> list[int]:
    """Return the labels that occur and have the most information, summed over layers, in ascending order."""
    information_Y = torch.stack([label_parts(table_YE) for table_YE in tables]).sum(0)
    present_Y = torch.stack([table_YE.sum(1) for table_YE in tables]).sum(0) > 0
    order = information_Y.argsort(descending=True, stable=True).tolist()
    return sorted([label for label in order if present_Y[label]][:num_labels])


def compute_expert_preference(table_YE: Tensor) -> Values:
    """Return p(expert | label) / p(expert), 1 where both are independent; NaN for experts without a token."""
    share_YE = (table_YE / table_YE.sum(1, keepdim=True).clamp(min=1e-300)).numpy()
    expert_E = (table_YE.sum(0) / table_YE.sum().clamp(min=1e-300)).numpy()
    ratio_YE: Values = np.full(share_YE.shape, np.nan)
    np.divide(share_YE, expert_E, out=ratio_YE, where=np.broadcast_to(expert_E > 0, share_YE.shape))
    return ratio_YE


def draw_labels(tables: Mapping[str, LabelTable], *, path: Path, title: str) -> Path | None:
    """Draw a row for each kind of label and a column for each layer; None, and no file, when there is no table."""
    if not tables:
        return None
    layers = select_layers(list(next(iter(tables.values())).layers))
    labels = {name: find_informative_labels(list(table.layers.values())) for name, table in tables.items()}
    heights = [0.7 + 0.2 * len(labels[name]) for name in tables]
    with new_figure(path, title, width=2.6 + 2.4 * max(len(layers), 2), height=1.4 + sum(heights)) as figure:
        axes = figure.subplots(len(tables), len(layers), squeeze=False, height_ratios=heights)
        for row, (name, table) in zip(axes, tables.items(), strict=True):
            for ax, layer in zip(row, layers, strict=True):
                image = _draw_layer_labels(ax, name, table, layer, labels[name])
            _set_label_names(row[0], table, labels[name])
        bar = figure.colorbar(image, ax=axes, shrink=0.8, location="right", ticks=[-3, -2, -1, 0, 1, 2, 3])
        bar.ax.set_yticklabels(["≤ ⅛ ×", "¼ ×", "½ ×", "as of all", "2 ×", "4 ×", "≥ 8 ×"])
        caption = "expert (colour: its share of the label over its share of all tokens; grey: an expert without tokens)"
        figure.supxlabel(caption, fontsize=9)
    return path


def select_layers(layers: Sequence[str]) -> list[str]:
    """Return at most MAX_LAYERS layers, evenly spaced, from the first to the last."""
    positions = np.linspace(0, len(layers) - 1, min(len(layers), MAX_LAYERS)).round().astype(int)
    return [layers[position] for position in positions]


def _draw_layer_labels(ax: Axes, name: str, table: LabelTable, layer: str, labels: Sequence[int]) -> AxesImage:
    ratio = compute_expert_preference(table.layers[layer])[labels]
    bound = MAX_LOG2_RATIO
    log2_ratio = np.log2(np.maximum(ratio, 2**-bound))  # NaN stays and shows the grey background
    image = ax.imshow(log2_ratio, aspect="auto", cmap="PuOr", vmin=-bound, vmax=bound, interpolation="nearest")
    ax.set_facecolor("#bbbbbb")
    information = table.information.get(layer)
    suffix = "" if information is None else f": {information:.3f}"
    ax.set_title(f"{name}, layer {layer}{suffix}", loc="left", fontsize=8.5)
    ax.set_yticks([])
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return image


def _set_label_names(ax: Axes, table: LabelTable, labels: Sequence[int]) -> None:
    names = [table.values[label] for label in labels]
    names = [name if len(name) <= MAX_NAME_LENGTH else f"{name[: MAX_NAME_LENGTH - 1]}…" for name in names]
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(axis="y", labelsize=7, length=0)
    num_present = int(torch.stack([table_YE.any(1) for table_YE in table.layers.values()]).any(0).sum())
    if len(labels) < num_present:  # absent labels do not count
        ax.set_ylabel(f"{len(labels)} of {num_present}", fontsize=7, color=GREY)
