"""The figure of a comparison: learning curves with bands over seeds, beside the paired differences."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from moebench.analysis.compare.axes import arrange_axes
from moebench.analysis.compare.axis_figure import draw_axis_lines
from moebench.analysis.compare.learning_curve import CurvePanel, Points, average_seeds, draw_learning_curves
from moebench.analysis.compare.values import Comparison, Difference
from moebench.reporting.canvas import GREY, line_style, new_figure
from moebench.reporting.formatting import format_plural

LANGUAGE_PANEL = CurvePanel()


def draw_comparison(
    journals: Mapping[str, Mapping[int, Points]],
    panel: CurvePanel = LANGUAGE_PANEL,
    *,
    path: Path,
    title: str,
    comparison: Comparison | None = None,
) -> Path:
    """Draw the mean of each arm over its seeds with a band, and the differences if a comparison is given.

    With a grid of several axes there is a third panel, the metric over one of them.
    `journals`: arm -> seed -> points. Raises ValueError when no arm has a finite point of the metric.
    """
    metric = f"eval/{panel.metric}"
    averaged = [curve for arm, seeds in journals.items() if (curve := average_seeds(arm, seeds, metric))]
    curves = [placed for curve in averaged if (placed := panel.place(curve))]
    if not curves:
        raise ValueError(f"no point of {metric} in the journals of {', '.join(journals) or 'no arm'}")
    num_diverged = {arm.arm: arm.num_diverged for arm in comparison.arms} if comparison else {}
    curves = [replace(curve, num_diverged=num_diverged.get(curve.arm, 0)) for curve in curves]
    styles = {arm: line_style(index) for index, arm in enumerate(journals)}
    height = max(4.4, 1.2 + 0.3 * len(curves))
    has_axes = comparison is not None and bool(arrange_axes(comparison))
    width = 17.0 if has_axes else 12.0 if comparison else 7.5
    with new_figure(path, title, width=width, height=height) as figure:
        if comparison and has_axes:
            left, middle, right = figure.subplots(1, 3, width_ratios=[1.2, 1.2, 1])
            draw_axis_lines(middle, comparison)
            _draw_differences(right, comparison, styles)
        elif comparison:
            left, right = figure.subplots(1, 2, width_ratios=[1.4, 1])
            _draw_differences(right, comparison, styles)
        else:
            left = figure.subplots()
        draw_learning_curves(left, curves, styles, panel)
    return path


def _draw_differences(ax: Axes, comparison: Comparison, styles: Mapping[str, Mapping[str, str]]) -> None:
    """Draw one row per arm: its difference to the baseline, the 95 % interval and the verdict."""
    shown = [pair for pair in comparison.differences if pair.mean is not None or pair.verdict == "diverged"]
    for row, difference in enumerate(shown):
        color = styles.get(difference.arm, {"color": GREY})["color"]
        _draw_difference(ax, row, difference, color, comparison.describe_verdict(difference.arm))
    ax.axvline(0, color=GREY, linewidth=0.9, linestyle="--", zorder=1)
    ax.set_yticks(range(len(shown)), [difference.arm for difference in shown])
    ax.set_ylim(max(len(shown), 1) - 0.5, -0.5)  # first arm on top
    ax.margins(x=0.12)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(4))
    side = "left" if comparison.lower_is_better else "right"
    ax.set_xlabel(f"{comparison.metric.replace('_', ' ')} minus {comparison.baseline}\n(better to the {side})")
    title = f"paired difference ({comparison.split}), 95 % interval; verdict by p Holm"
    ax.set_title(title, loc="left", color=GREY, fontsize=8)
    if not shown:
        ax.text(0.5, 0.5, "no seed in common yet", transform=ax.transAxes, ha="center", color=GREY)


def _draw_difference(ax: Axes, row: int, difference: Difference, color: str, verdict: str) -> None:
    if difference.interval:
        ax.plot(difference.interval, [row, row], color=color, linewidth=2.2, solid_capstyle="round")
    if difference.mean is not None:  # else the arm diverged in every seed
        fill = color if difference.verdict in ("better", "worse") else "white"
        ax.plot([difference.mean], [row], "o", markersize=6, color=color, markerfacecolor=fill)
    ax.annotate(
        f"{verdict}, {format_plural(len(difference.seeds), 'seed')}" if difference.seeds else verdict,
        xy=(1.03, row),
        xycoords=("axes fraction", "data"),
        va="center",
        annotation_clip=False,
    )
