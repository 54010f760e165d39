"""The panel of a grid with several axes: the metric over one axis, one line for each value of the other."""

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from moebench.analysis.compare.axes import AxisGrid, arrange_axes
from moebench.analysis.compare.values import ArmSummary, Comparison
from moebench.reporting.canvas import line_style

LOG_RATIO = 4
"""Values that are positive and span at least this factor are drawn on a logarithmic axis."""


def draw_axis_lines(ax: Axes, comparison: Comparison) -> None:
    """Draw the mean of every arm with its interval; an arm that is the same at every value is a horizontal line."""
    grids = arrange_axes(comparison)
    positions, is_numeric = _find_positions(comparison, grids[0])
    lines = [(grid, row) for grid in grids for row in grid.rows]
    for number, (grid, row) in enumerate(lines):
        style, label = line_style(number), f"{row}, {grid.others}" if grid.others else row
        arms = {column: arm for column, arm in grid.rows[row].items() if arm.mean is not None}
        if row in grid.constant:
            _draw_constant(ax, next(iter(arms.values()), None), label, style)
        elif arms:
            points = [(positions[column], arm) for column, arm in arms.items() if arm.mean is not None]
            ax.errorbar(
                [x for x, _ in points],
                [arm.mean or 0.0 for _, arm in points],
                yerr=[_half_width(arm) for _, arm in points],
                marker="o",
                markersize=4,
                capsize=2,
                label=label,
                **style,  # type: ignore[arg-type]
            )
    if is_numeric and min(positions.values()) > 0 and max(positions.values()) >= LOG_RATIO * min(positions.values()):
        ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator(list(positions.values())))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticklabels([f"{x:g}" for x in positions.values()] if is_numeric else list(positions))
    ax.set_xlabel(grids[0].column_key)
    ax.set_ylabel(f"{comparison.metric.replace('_', ' ')} ({comparison.split})")
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize=8)


def _find_positions(comparison: Comparison, grid: AxisGrid) -> tuple[dict[str, float], bool]:
    """Return column label -> place on the axis: the value where all are different numbers, else its rank."""
    values = {
        axes[grid.column_key]: comparison.varies.get(arm, {}).get(grid.column_key)
        for arm, axes in comparison.axes.items()
        if grid.column_key in axes
    }
    numbers = {
        column: float(value)
        for column, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    if len(numbers) == len(values) == len(set(numbers.values())):
        return numbers, True
    return {column: float(rank) for rank, column in enumerate(grid.columns)}, False


def _draw_constant(ax: Axes, arm: ArmSummary | None, label: str, style: dict[str, str]) -> None:
    if arm is None or arm.mean is None:
        return
    ax.axhline(arm.mean, label=label, linewidth=1.2, **style)  # type: ignore[arg-type]
    if arm.interval:
        ax.axhspan(*arm.interval, color=style["color"], alpha=0.1, linewidth=0)


def _half_width(arm: ArmSummary) -> float:
    return (arm.interval[1] - arm.interval[0]) / 2 if arm.interval else 0.0
