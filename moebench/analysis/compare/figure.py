"""The figure of a comparison: learning curves with bands over seeds, beside the paired differences."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from moebench.analysis.compare.axes import arrange_axes
from moebench.analysis.compare.axis_figure import draw_axis_lines
from moebench.analysis.compare.learning_curve import (
    CurvePanel,
    LearningCurve,
    Points,
    average_seeds,
    draw_learning_curves,
)
from moebench.analysis.compare.shown_arms import MAX_ARMS, describe_selection, find_tone, select_names
from moebench.analysis.compare.small_multiples import COLORS, PANEL_INCHES, count_rows, draw_small_multiples
from moebench.analysis.compare.values import Comparison, Difference
from moebench.reporting.canvas import GREY, line_style, new_figure
from moebench.reporting.formatting import format_plural

LANGUAGE_PANEL = CurvePanel()
MAX_OVERLAID = 6
"""With more arms, lines in one panel cannot be told apart: each has a panel of its own."""
AXIS_WIDTH = 5.0
"""Width of the panel over an axis, in inches."""
CHARACTER = 0.072
"""Mean width of a character, in inches."""


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
    if len(curves) > MAX_OVERLAID:
        _draw_many(curves, panel, comparison, path=path, title=title)
        return path
    height = max(4.4, 1.2 + 0.3 * len(curves))
    width = 7.5 if comparison is None else 17.0 if _has_axis_panel(comparison) else 12.0
    with new_figure(path, title, width=width, height=height) as figure:
        if comparison and _has_axis_panel(comparison):
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


def _find_width(comparison: Comparison | None) -> float:
    """Return the width in inches of the panels beside the curves."""
    if comparison is None:
        return 0.0
    return _find_forest_width(comparison) + (AXIS_WIDTH if _has_axis_panel(comparison) else 0.0)


def _find_forest_width(comparison: Comparison) -> float:
    """Return the width in inches of the differences with the names and verdicts beside them."""
    texts = [(len(pair.arm), len(comparison.describe_verdict(pair.arm))) for pair in comparison.differences]
    name, verdict = (max(lengths, default=0) for lengths in zip(*texts, strict=True)) if texts else (0, 0)
    return 2.6 + CHARACTER * (name + verdict + len(", 10 seeds"))


def _has_axis_panel(comparison: Comparison) -> bool:
    """Return whether there are two axes, with rows that are few enough to be told apart as lines."""
    return 0 < sum(len(grid.rows) for grid in arrange_axes(comparison)) <= MAX_ARMS


def _draw_many(
    curves: Sequence[LearningCurve], panel: CurvePanel, comparison: Comparison | None, *, path: Path, title: str
) -> None:
    """Draw a panel for each of at most 12 arms, and the differences of all."""
    baseline = comparison.baseline if comparison else None
    last = {curve.arm: float(curve.means[-1]) for curve in curves}
    names = select_names(last, baseline, lower_is_better=panel.lower_is_better)
    shown = [curve for curve in curves if curve.arm in names]
    tones = {arm.arm: find_tone(comparison, arm.arm) for arm in comparison.arms} if comparison else {}
    styles = {arm: {"color": COLORS[tone]} for arm, tone in tones.items()}
    num_rows = len(comparison.differences) if comparison else 0
    curves_height = 1.1 + PANEL_INCHES * count_rows(len(shown))
    height = max(curves_height, 1.4 + 0.3 * num_rows)
    width = 7.5 + _find_width(comparison)
    selection = describe_selection(len(shown), len(curves))
    with new_figure(path, f"{title}  {selection}".strip(), width=width, height=height) as figure:
        has_axes = comparison is not None and _has_axis_panel(comparison)
        ratios = [7.5, *([AXIS_WIDTH] if has_axes else []), *([_find_forest_width(comparison)] if comparison else [])]
        parts = figure.subfigures(1, len(ratios), width_ratios=ratios, squeeze=False)[0]
        top = parts[0]
        if height > curves_height + 0.5:
            top = parts[0].subfigures(2, 1, height_ratios=[curves_height, height - curves_height])[0]
        draw_small_multiples(top, shown, tones, panel, baseline)
        if comparison and has_axes:
            draw_axis_lines(parts[1].subplots(), comparison)
        if comparison:
            _draw_differences(parts[-1].subplots(), comparison, styles, default=COLORS["open"])


def _draw_differences(
    ax: Axes, comparison: Comparison, styles: Mapping[str, Mapping[str, str]], default: str = GREY
) -> None:
    """Draw one row per arm: its difference to the baseline, the 95 % interval and the verdict."""
    shown = [pair for pair in comparison.differences if pair.mean is not None or pair.verdict == "diverged"]
    for row, difference in enumerate(shown):
        color = styles.get(difference.arm, {"color": default})["color"]
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
