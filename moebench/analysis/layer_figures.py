"""Figures of the layers of one run over its logged steps: heat maps of the loads, and curves of each quantity."""

from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import QuadMesh
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.ticker import FuncFormatter, MaxNLocator

from moebench.analysis.statistics import Values
from moebench.reporting.canvas import new_figure
from moebench.runs.layer_series import LayerPoint, LayerValues, select_layers

MAX_LAYERS = 12
"""Panels; of more layers, the most uneven one and others evenly spaced."""
MAX_ROWS = 256
"""Largest number of rows of a panel; further experts are averaged with their neighbours."""
MAX_LOG2_RATIO = 3.0
"""Range of the colours in powers of two: an eighth to eight times an even load."""
GROUND = "#bbbbbb"
QUANTITIES: tuple[tuple[str, Callable[[LayerValues], float | None]], ...] = (
    ("MaxVio", lambda layer: layer.max_violation),
    ("dead experts", lambda layer: float(layer.dead_experts)),
    ("assignments dropped", lambda layer: layer.drop_rate),
    ("router entropy over ln E", lambda layer: layer.entropy),
    ("largest logit", lambda layer: layer.logit_max),
    ("rows per token", lambda layer: layer.experts_per_token),
)
FROM_0, MIN_TOP = ("MaxVio", "dead experts", "assignments dropped"), 0.06
"""Quantities whose axis begins at 0, and how high it is at least: nothing dropped is a line at the bottom."""


def draw_load_maps(points: Sequence[LayerPoint], *, path: Path, title: str) -> Path:
    """Draw the load of each expert over the logged steps, a panel for each layer.

    Raises ValueError when there is no layer.
    """
    layers = _select_layers(points)
    columns = min(len(layers), 3)
    rows = ceil(len(layers) / columns)
    with new_figure(path, title, width=max(3.6 * columns + 0.9, 6.0), height=1.2 + 2.1 * rows) as figure:
        axes = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
        for ax, layer in zip(axes, layers, strict=False):
            mesh = _draw_layer_map(ax, layer, points)
        _remove_empty(axes, len(layers), columns)
        bar = figure.colorbar(mesh, ax=axes[: len(layers)].tolist(), location="right", ticks=[-3, -2, -1, 0, 1, 2, 3])
        bar.ax.set_yticklabels(["≤ ⅛ ×", "¼ ×", "½ ×", "even", "2 ×", "4 ×", "≥ 8 ×"])
        figure.supylabel("expert", fontsize=9)
        caption = "training step (colour: load over an even load; grey: no token; titles: at the end)"
        figure.supxlabel(caption, fontsize=9)
    return path


def _draw_layer_map(ax: Axes, layer: str, points: Sequence[LayerPoint]) -> QuadMesh:
    values = [(point.step, point.layers[layer].load) for point in points if layer in point.layers]
    num_experts = len(values[-1][1])
    values = [(step, load) for step, load in values if len(load) == num_experts]
    ratio_PE: Values = np.stack([_compute_ratio(load) for _, load in values])
    log2_EP: Values = np.full((ratio_PE.shape[1], len(values)), np.nan)
    np.log2(np.maximum(ratio_PE.T, 2**-MAX_LOG2_RATIO), out=log2_EP, where=ratio_PE.T > 0)
    # The column of a logged step reaches back to the one before it.
    edges = np.linspace(-0.5, num_experts - 0.5, len(log2_EP) + 1)
    bound = MAX_LOG2_RATIO
    mesh = ax.pcolormesh(
        [0, *(step for step, _ in values)], edges, log2_EP, cmap="PuOr_r", vmin=-bound, vmax=bound, rasterized=True
    )
    ax.set_facecolor(GROUND)
    last = ratio_PE[-1]
    dead = int((last == 0).sum())
    ax.set_title(
        f"layer {layer}: busiest {last.max():.1f} × even" + (f", {dead} unused" if dead else ""),
        loc="left",
        fontsize=8.5,
    )
    ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return mesh


def _compute_ratio(load: Sequence[int]) -> Values:
    """Return the loads as multiples of an even load, at most `MAX_ROWS` of them."""
    load_E = np.asarray(load, dtype=np.float64)
    ratio_E = load_E * len(load_E) / max(load_E.sum(), 1)
    return np.array([part.mean() for part in np.array_split(ratio_E, min(len(ratio_E), MAX_ROWS))])


def draw_layer_curves(points: Sequence[LayerPoint], *, path: Path, title: str) -> Path:
    """Draw each quantity over the logged steps, a line for each layer in the colour of its depth.

    Quantities that no layer has are left out. Raises ValueError when there is no layer.
    """
    layers = _select_layers(points)
    shown = [
        (name, read)
        for name, read in QUANTITIES
        if any(read(layer) is not None for point in points for layer in point.layers.values())
    ]
    columns = min(len(shown), 3)
    rows = ceil(len(shown) / columns)
    colors = ListedColormap(mpl.colormaps["viridis"](np.linspace(0, 0.9, len(layers))))
    with new_figure(path, title, width=3.5 * columns + 0.9, height=1.2 + 2.1 * rows) as figure:
        axes = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
        for ax, (name, read) in zip(axes, shown, strict=False):
            for layer, color in zip(layers, colors(np.arange(len(layers))), strict=True):
                steps = [point.step for point in points if layer in point.layers]
                values = [read(point.layers[layer]) for point in points if layer in point.layers]
                ax.plot(steps, [np.nan if value is None else value for value in values], color=color, linewidth=1.1)
            ax.set_title(name, loc="left", fontsize=8.5)
            ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            if name in FROM_0:
                ax.set_ylim(bottom=0, top=None if ax.get_ylim()[1] > MIN_TOP else MIN_TOP)
            if name == "assignments dropped":
                ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g} %"))
        _remove_empty(axes, len(shown), columns)
        scale = ScalarMappable(Normalize(-0.5, len(layers) - 0.5), colors)
        ticks = range(len(layers))
        bar = figure.colorbar(scale, ax=axes[: len(shown)].tolist(), location="right", ticks=[*ticks])
        bar.ax.set_yticklabels([f"layer {layer}" for layer in layers])
        bar.ax.invert_yaxis()
        figure.supxlabel("training step", fontsize=9)
    return path


def _remove_empty(axes: np.ndarray, num_panels: int, columns: int) -> None:
    """Remove the panels that are not needed; those above them have the labels of the steps instead."""
    for ax in axes[num_panels:]:
        ax.remove()
    for ax in axes[max(num_panels - columns, 0) : num_panels]:
        ax.tick_params(labelbottom=True)


def _select_layers(points: Sequence[LayerPoint]) -> list[str]:
    layers = select_layers(points, MAX_LAYERS)
    if not layers:
        raise ValueError("no expert layer to draw: the series are empty")
    return layers
