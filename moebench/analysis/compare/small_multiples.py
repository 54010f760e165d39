"""Learning curves of many arms: a panel for each, with the baseline behind it, on common axes."""

from collections.abc import Sequence
from math import ceil

from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.ticker import EngFormatter, MaxNLocator

from moebench.analysis.compare.learning_curve import (
    CurvePanel,
    LearningCurve,
    describe_bands,
    find_limits,
    format_curve_label,
)
from moebench.analysis.compare.trivial_lines import WARNING_COLOR
from moebench.reporting.canvas import GREY
from moebench.runs.trivial_baselines import find_reference

COLUMNS = 4
PANEL_INCHES = 1.45
"""Height of a panel with its title."""
TITLE_LENGTH = 22
"""Characters that fit above a panel; longer names are smaller."""
COLORS = {
    "good": "#19724a",
    "bad": "#b0432b",
    "same": "#6a4a8c",
    "open": "#3d6292",
    "warn": "#9a6200",
    "baseline": "#222222",
}
"""Mark of each verdict on an arm; without a comparison all arms are open."""


def count_rows(num_curves: int) -> int:
    """Return the number of rows of panels."""
    return ceil(num_curves / COLUMNS)


def draw_small_multiples(
    figure: FigureBase, curves: Sequence[LearningCurve], tones: dict[str, str], panel: CurvePanel, baseline: str | None
) -> None:
    """Draw one panel for each curve; `tones`: that of the verdict on each arm, which chooses the colour."""
    axes = figure.subplots(count_rows(len(curves)), COLUMNS, sharex=True, sharey=True, squeeze=False).ravel()
    last = max(float(curve.steps[-1]) for curve in curves)
    limits = find_limits(curves, last)
    reference = next((curve for curve in curves if curve.arm == baseline), None)
    for ax, curve in zip(axes, curves, strict=False):
        if reference is not None and curve is not reference:
            ax.plot(reference.steps, reference.means, color="#9a9a9a", linewidth=1.1)
        color = COLORS[tones.get(curve.arm, "open")]
        ax.fill_between(curve.steps, curve.lows, curve.highs, color=color, alpha=0.16, linewidth=0)
        ax.plot(curve.steps, curve.means, color=color, linewidth=1.6)
        _finish_panel(ax, curve, limits, last)
    for ax in axes[len(curves) :]:
        ax.remove()
    name = panel.metric.replace("_", " ")
    figure.supylabel(f"{name} ({'lower' if panel.lower_is_better else 'higher'} is better)", fontsize=9)
    grey = f"grey: {baseline}; " if reference is not None else ""
    lines = [f"{panel.x_label}; {grey}{describe_bands(curves)}", _describe_reference(panel)]
    figure.supxlabel("\n".join(filter(None, lines)), fontsize=8, color=GREY)
    if panel.warning:
        figure.suptitle(panel.warning, fontsize=8, color=WARNING_COLOR)


def _finish_panel(ax: Axes, curve: LearningCurve, limits: tuple[float, float], last: float) -> None:
    is_visible = limits[0] <= float(curve.means[-1]) <= limits[1]
    label = format_curve_label(curve, is_visible=is_visible)
    ax.set_title(label, loc="left", fontsize=min(8.5, 8.5 * TITLE_LENGTH / len(label)))
    ax.set_xlim(0, last)
    ax.set_ylim(*limits)
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.xaxis.set_major_locator(MaxNLocator(3))
    ax.yaxis.set_major_locator(MaxNLocator(4))
    ax.tick_params(labelsize=7.5)
    ax.grid(axis="y", color="#e6e6e6", linewidth=0.7)


def _describe_reference(panel: CurvePanel) -> str:
    reference = find_reference(panel.trivial_baselines, panel.metric)
    return f"trivial baseline: {reference.name} {reference.values[panel.metric]:.4g}" if reference else ""
