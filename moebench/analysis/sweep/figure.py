"""The figure of a curve: quality over the FLOPs that a token is measured to cost, all arms and the dense reference."""

import textwrap
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from moebench.analysis import statistics as st
from moebench.analysis.sweep.pareto import find_front
from moebench.analysis.sweep.points import Curve, Point
from moebench.reporting.canvas import GREY, LINE_STYLES, PALETTE, new_figure
from moebench.reporting.formatting import format_count

LOG_FROM = 4.0
"""Ratio of the largest to the smallest FLOPs from which the axis is logarithmic."""
MAX_LABELS = 40
"""Points whose value of the first axis is written beside them."""
MARKERS = ("o", "s", "^", "D", "v", "P")
TITLE_WIDTH = 90
"""Characters of a line of the title."""


@dataclass(frozen=True, kw_only=True)
class Style:
    """How a line of the figure looks."""

    color: str
    marker: str
    linestyle: str = "-"
    size: float = 5


DENSE = Style(color=PALETTE[0], marker="*", linestyle=":", size=11)


def draw_curve(curve: Curve, path: Path) -> Path:
    """Draw each point with its 95 % intervals over seeds in both directions; hollow where it is dominated.

    A line joins the points of an arm that differ in the first axis alone; it is in the colour of the arm.
    """
    front = find_front(curve.points, lower_is_better=curve.lower_is_better)
    hollow = {id(curve.points[index]) for index in front.dominated}
    title = "\n".join(textwrap.wrap(curve.title, TITLE_WIDTH)[:2])
    with new_figure(path, title, width=8.4, height=5.0) as figure:
        ax = figure.subplots()
        handles = []
        for (name, points), style in zip(curve.group_by_line().items(), _select_styles(curve), strict=True):
            ax.plot(
                [point.mean_flops for point in points],
                [point.mean for point in points],
                linewidth=1.0,
                color=style.color,
                linestyle=style.linestyle,
            )
            for point in points:
                _draw_point(ax, point, style, is_hollow=id(point) in hollow)
                if len(curve.points) <= MAX_LABELS:
                    _label_point(ax, point, curve.axes[0].key, style.color)
            handles.append(_build_handle(style, name))
        if len({point.mean_flops for point in curve.points}) > 1:
            flops = [point.mean_flops for point in curve.points]
            ax.set_xscale("log" if max(flops) > LOG_FROM * min(flops) else "linear")
        ax.xaxis.set_major_formatter(lambda value, _: format_count(value))
        ax.set_xlabel("forward FLOPs per token, measured on the test split")
        ax.set_ylabel(f"{curve.metric.replace('_', ' ')} ({curve.direction} is better)")
        ax.grid(color="#e6e6e6", linewidth=0.7)
        if hollow:
            handles.append(_build_handle(Style(color=GREY, marker="o", linestyle=""), "dominated", is_hollow=True))
        ax.legend(handles=handles, frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return path


def _select_styles(curve: Curve) -> list[Style]:
    """Return the style of each line: a colour for each arm, a marker for each line of it."""
    arms = list(dict.fromkeys(point.arm for point in curve.points if not point.is_dense))
    num_lines: dict[str, int] = {}
    styles = []
    for points in curve.group_by_line().values():
        arm = points[0].arm
        if points[0].is_dense:
            styles.append(DENSE)
            continue
        repeat, color = divmod(arms.index(arm), len(PALETTE) - 1)  # black is that of the dense arm
        line = num_lines[arm] = num_lines.get(arm, -1) + 1
        styles.append(
            Style(
                color=PALETTE[1 + color],
                marker=MARKERS[(line + repeat) % len(MARKERS)],
                linestyle=LINE_STYLES[(line + repeat) % len(LINE_STYLES)],
            )
        )
    return styles


def _build_handle(style: Style, label: str, *, is_hollow: bool = False) -> Line2D:
    return Line2D(
        [],
        [],
        color=style.color,
        marker=style.marker,
        linestyle=style.linestyle,  # type: ignore[arg-type]  # a str of the ones that it names
        markerfacecolor="white" if is_hollow else style.color,
        markersize=min(style.size, 8),
        label=label,
    )


def _draw_point(ax: Axes, point: Point, style: Style, *, is_hollow: bool) -> None:
    ax.errorbar(
        point.mean_flops,
        point.mean,
        xerr=_to_errors(point.mean_flops, point.flops_interval),
        yerr=_to_errors(point.mean, point.interval),
        color=style.color,
        marker=style.marker,
        markersize=style.size,
        markerfacecolor="white" if is_hollow else style.color,
        elinewidth=0.8,
        capsize=2,
    )
    if point.is_dense:
        ax.axhline(point.mean, color=GREY, linewidth=0.8, linestyle=":", zorder=0)


def _to_errors(mean: float, interval: st.Interval | None) -> list[list[float]] | None:
    return [[mean - interval[0]], [interval[1] - mean]] if interval else None


def _label_point(ax: Axes, point: Point, key: str, color: str) -> None:
    """Write the value of the first axis beside the point."""
    position = (point.mean_flops, point.mean)
    ax.annotate(point.settings.get(key, ""), position, (5, 4), textcoords="offset points", fontsize=7, color=color)
