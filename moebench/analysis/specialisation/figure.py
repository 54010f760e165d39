"""The figure of what experts specialise in: which of them takes more of a label than of all tokens."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from moebench.analysis.compare.statistics import Values
from moebench.reporting.canvas import GREY, sheet
from moebench.routing.metrics import label_parts
from moebench.training.label_tables import LabelTable

MOST_LABELS = 16
"""Labels of a kind that are drawn: of more, those of which experts know most."""
MOST_LAYERS = 6
"""Layers that are drawn: of more, evenly spaced ones, the first and the last among them."""
LONGEST_NAME = 20
BOUND = 3.0
"""Of the colours, in powers of two: an eighth to eight times."""


def telling_labels(tables: Sequence[Tensor], most: int = MOST_LABELS) -> list[int]:
    """Return the labels of which experts know most, summed over layers, in their own order; absent ones left out."""
    added_Y = torch.stack([label_parts(table_YE) for table_YE in tables]).sum(0)
    present_Y = torch.stack([table_YE.sum(1) for table_YE in tables]).sum(0) > 0
    order = added_Y.argsort(descending=True, stable=True).tolist()
    return sorted([label for label in order if present_Y[label]][:most])


def preference(table_YE: Tensor) -> Values:
    """Return p(expert | label) / p(expert), 1 where a label says nothing; NaN for experts without a token."""
    share_YE = (table_YE / table_YE.sum(1, keepdim=True).clamp(min=1e-300)).numpy()
    expert_E = (table_YE.sum(0) / table_YE.sum().clamp(min=1e-300)).numpy()
    found: Values = np.full(share_YE.shape, np.nan)
    np.divide(share_YE, expert_E, out=found, where=np.broadcast_to(expert_E > 0, share_YE.shape))
    return found


def draw_labels(tables: Mapping[str, LabelTable], *, path: Path, title: str) -> Path | None:
    """Draw a row for each kind of label and a column for each layer; None, and no file, when there is no table."""
    if not tables:
        return None
    layers = spaced(list(next(iter(tables.values())).layers))
    labels = {name: telling_labels(list(table.layers.values())) for name, table in tables.items()}
    heights = [0.7 + 0.2 * len(labels[name]) for name in tables]
    with sheet(path, title, width=2.6 + 2.4 * max(len(layers), 2), height=1.4 + sum(heights)) as figure:
        axes = figure.subplots(len(tables), len(layers), squeeze=False, height_ratios=heights)
        for row, (name, table) in zip(axes, tables.items(), strict=True):
            for ax, layer in zip(row, layers, strict=True):
                image = _draw_layer(ax, name, table, layer, labels[name])
            _name_labels(row[0], table, labels[name])
        bar = figure.colorbar(image, ax=axes, shrink=0.8, location="right", ticks=[-3, -2, -1, 0, 1, 2, 3])
        bar.ax.set_yticklabels(["≤ ⅛ ×", "¼ ×", "½ ×", "as of all", "2 ×", "4 ×", "≥ 8 ×"])
        words = "expert (colour: its share of the label over its share of all tokens; grey: an expert without tokens)"
        figure.supxlabel(words, fontsize=9)
    return path


def spaced(layers: Sequence[str]) -> list[str]:
    """Return at most MOST_LAYERS layers, evenly spaced, from the first to the last."""
    places = np.linspace(0, len(layers) - 1, min(len(layers), MOST_LAYERS)).round().astype(int)
    return [layers[place] for place in places]


def _draw_layer(ax: Axes, name: str, table: LabelTable, layer: str, labels: Sequence[int]) -> AxesImage:
    ratio = preference(table.layers[layer])[labels]
    powers = np.log2(np.maximum(ratio, 2**-BOUND))  # NaN stays, and shows the grey behind
    image = ax.imshow(powers, aspect="auto", cmap="PuOr", vmin=-BOUND, vmax=BOUND, interpolation="nearest")
    ax.set_facecolor("#bbbbbb")
    known = table.information.get(layer)
    ax.set_title(f"{name}, layer {layer}" + ("" if known is None else f": {known:.3f}"), loc="left", fontsize=8.5)
    ax.set_yticks([])
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return image


def _name_labels(ax: Axes, table: LabelTable, labels: Sequence[int]) -> None:
    names = [table.values[label] for label in labels]
    ax.set_yticks(range(len(names)), [n if len(n) <= LONGEST_NAME else f"{n[: LONGEST_NAME - 1]}…" for n in names])
    ax.tick_params(axis="y", labelsize=7, length=0)
    present = int(torch.stack([table_YE.any(1) for table_YE in table.layers.values()]).any(0).sum())
    if len(labels) < present:  # labels that never occur are not left out for being dull
        ax.set_ylabel(f"{len(labels)} of {present}", fontsize=7, color=GREY)
