"""The figure of a curve: quality over the FLOPs that a token is measured to cost, all arms and the dense reference."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from moebench.analysis import statistics as st
from moebench.analysis.sweep.pareto import Front, find_front
from moebench.analysis.sweep.points import Curve, Point
from moebench.reporting.canvas import GREY, line_style, new_figure

LOG_FROM = 4.0
"""Ratio of the largest to the smallest FLOPs from which the axis is logarithmic."""
MAX_LABELS = 40
"""Points whose value of the first axis is written beside them."""


def draw_curve(curve: Curve, path: Path) -> Path:
    """Draw each point with its 95 % intervals over seeds in both directions; hollow where it is dominated.

    A line joins the points of an arm that differ in the first axis alone.
    """
    front = find_front(curve.points, lower_is_better=curve.lower_is_better)
    lines = curve.group_by_line()
    with new_figure(path, curve.title, width=8.0, height=4.8 + 0.02 * len(lines)) as figure:
        ax = figure.subplots()
        handles = []
        styles = iter(range(len(lines)))
        for name, points in lines.items():
            style = {"color": "#000000", "linestyle": ":"} if points[0].is_dense else line_style(1 + next(styles))
            handles.append(_draw_line(ax, name, points, style, _list_hollow(points, curve, front)))
            _label_points(ax, curve, points, style["color"])
        for point in curve.points:
            if point.is_dense:
                ax.axhline(point.mean, color=GREY, linewidth=0.8, linestyle=":", zorder=0)
        flops = [point.mean_flops for point in curve.points]
        if max(flops) > LOG_FROM * min(flops):
            ax.set_xscale("log")
        ax.set_xlabel("forward FLOPs per token, measured on the test split")
        ax.set_ylabel(f"{curve.metric.replace('_', ' ')} ({curve.direction} is better)")
        ax.grid(color="#e6e6e6", linewidth=0.7)
        hollow = Line2D([], [], linestyle="", marker="o", markerfacecolor="white", color=GREY, label="dominated")
        figure.legend(handles=[*handles, hollow], frameon=False, loc="outside right upper", fontsize=8)
    return path


def _list_hollow(points: Sequence[Point], curve: Curve, front: Front) -> list[bool]:
    return [curve.points.index(point) in front.dominated for point in points]


def _draw_line(
    ax: Axes, name: str, points: Sequence[Point], style: dict[str, str], is_dominated: Sequence[bool]
) -> Line2D:
    xs, ys = [point.mean_flops for point in points], [point.mean for point in points]
    ax.plot(xs, ys, linewidth=1.0, **style)  # type: ignore[arg-type]
    marker = "*" if points[0].is_dense else "o"
    for point, x, y, is_hollow in zip(points, xs, ys, is_dominated, strict=True):
        ax.errorbar(
            x,
            y,
            xerr=_to_errors(x, point.flops_interval),
            yerr=_to_errors(y, point.interval),
            color=style["color"],
            marker=marker,
            markersize=10 if point.is_dense else 5,
            markerfacecolor="white" if is_hollow else style["color"],
            elinewidth=0.8,
            capsize=2,
        )
    return Line2D([], [], marker=marker, markersize=5, label=name, **style)  # type: ignore[arg-type]


def _to_errors(mean: float, interval: st.Interval | None) -> list[list[float]] | None:
    return [[mean - interval[0]], [interval[1] - mean]] if interval else None


def _label_points(ax: Axes, curve: Curve, points: Sequence[Point], color: str) -> None:
    """Write the value of the first axis beside each point, unless there are too many."""
    if len(curve.points) > MAX_LABELS:
        return
    for point in points:
        value = point.settings.get(curve.axes[0].key, "")
        ax.annotate(value, (point.mean_flops, point.mean), (4, 4), textcoords="offset points", fontsize=7, color=color)
