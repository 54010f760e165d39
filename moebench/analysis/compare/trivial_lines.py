"""Trivial baselines in the figure of learning curves: thin horizontal lines with names."""

import textwrap
from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes

from moebench.analysis.compare.label_positions import spread_labels
from moebench.reporting.canvas import GREY
from moebench.reporting.formatting import format_number
from moebench.runs.trivial_baselines import find_reference
from moebench.tasks.baselines.baseline import TrivialBaseline

WARNING_COLOR = "#D55E00"
NAME_SIZE = 6.5
LINE_LENGTH = 95
"""Characters of the text above the axes, which is as wide as they are."""


def include_reference(
    limits: tuple[float, float], baselines: Iterable[TrivialBaseline], metric: str, *, lower_is_better: bool
) -> tuple[float, float]:
    """Return y limits that show the reference too where it is better than all that they show."""
    reference = find_reference(baselines, metric)
    if reference is None:
        return limits
    bottom, top = limits
    value = reference.values[metric]
    if lower_is_better:
        return min(bottom, value - 0.06 * max(top - value, 0)), top
    return bottom, max(top, value + 0.06 * max(value - bottom, 0))


def draw_trivial_lines(ax: Axes, baselines: Sequence[TrivialBaseline], metric: str) -> str:
    """Draw the baselines inside the axes' limits; return a text that names those outside, empty without baselines."""
    (bottom, top), values = (
        ax.get_ylim(),
        {each.name: each.values[metric] for each in baselines if metric in each.values},
    )
    inside = sorted((value, name) for name, value in values.items() if bottom <= value <= top)
    gap = 0.13 * ax.figure.dpi / ax.figure.bbox.height  # 0.13 inches as a share of the figure
    places = spread_labels([(value - bottom) / (top - bottom) for value, _ in inside], gap)
    for (value, name), place in zip(inside, places, strict=True):
        ax.axhline(value, color=GREY, linewidth=0.6, zorder=0)
        ax.text(0.01, place, name, transform=ax.transAxes, va="bottom", color=GREY, fontsize=NAME_SIZE)
    outside = [f"{name} {format_number(value)}" for name, value in values.items() if not bottom <= value <= top]
    text = "thin lines: trivial baselines" if inside else "trivial baselines"
    text += f"; outside: {', '.join(outside)}" if outside else ""
    return textwrap.fill(text, LINE_LENGTH) if values else ""


def draw_warning(ax: Axes, text: str) -> None:
    """Write the mark of an experiment below the trivial baselines into the axes."""
    ax.text(0.5, 0.99, text, transform=ax.transAxes, ha="center", va="top", color=WARNING_COLOR, fontsize=8)
