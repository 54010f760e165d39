"""Learning curves: the journals of several seeds become one mean and one band for each arm, drawn into one panel."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator

from moebench.analysis import statistics as st
from moebench.analysis.compare.label_positions import spread_labels
from moebench.analysis.compare.trivial_lines import draw_trivial_lines, draw_warning, include_reference
from moebench.reporting.canvas import GREY
from moebench.reporting.formatting import format_plural
from moebench.runs.journal import Point
from moebench.tasks.baselines.baseline import TrivialBaseline

Points = Sequence[Point]
Band = Literal["t", "range", "none"]
WARM_UP = 0.5
"""Share of the run that the y limits leave out: its steep start would flatten all curves."""
MAX_BANDS = 12
"""With more arms, overlapping bands are unreadable and left out."""


@dataclass(frozen=True, kw_only=True)
class LearningCurve:
    """One arm over its seeds at the steps that they share."""

    arm: str
    steps: st.Values
    means: st.Values
    lows: st.Values
    highs: st.Values
    num_seeds: int
    """Seeds in the mean."""
    num_started: int
    """Seeds that have points."""
    band: Band
    """Meaning of lows and highs: a 95 % t interval, the range over seeds, or none for a single seed."""
    num_diverged: int = 0
    """Number of diverged seeds among all planned ones."""


def average_seeds(arm: str, seeds: Mapping[int, Points], metric: str) -> LearningCurve | None:
    """Return the mean of an arm over its seeds at the steps they share; None when no seed has a finite point.

    Seeds that have not reached the last step of the furthest one (still training, or stopped) are left out of the mean,
    which would otherwise jump where they end; `num_started` counts them too.
    """
    all_series = {seed: series for seed, points in seeds.items() if (series := _finite_series(points, metric))}
    if not all_series:
        return None
    last_step = max(max(series) for series in all_series.values())
    complete = [series for series in all_series.values() if max(series) == last_step]
    steps = sorted(set.intersection(*(set(series) for series in complete)))
    value_SP = np.array([[series[step] for step in steps] for series in complete])
    low_P, high_P, band = _compute_band(value_SP)
    return LearningCurve(
        arm=arm,
        steps=np.array(steps, dtype=np.float64),
        means=value_SP.mean(axis=0),
        lows=low_P,
        highs=high_P,
        num_seeds=len(complete),
        num_started=len(all_series),
        band=band,
    )


def _finite_series(points: Points, metric: str) -> dict[int, float]:
    """Return step -> value of the finite points; of a step written again after a resume, the last value."""
    return {
        point.step: float(point.metrics[metric])
        for point in points
        if metric in point.metrics and isfinite(point.metrics[metric])
    }


def _compute_band(value_SP: st.Values) -> tuple[st.Values, st.Values, Band]:
    if len(value_SP) >= st.MIN_SEEDS:
        bounds = np.array([st.mean_interval(value_S) for value_S in value_SP.T])
        return bounds[:, 0], bounds[:, 1], "t"
    return value_SP.min(axis=0), value_SP.max(axis=0), "range" if len(value_SP) > 1 else "none"


@dataclass(frozen=True, kw_only=True)
class CurvePanel:
    """What a panel of learning curves shows besides the curves."""

    metric: str = "bits_per_byte"
    """On the validation split."""
    lower_is_better: bool = True
    trivial_baselines: tuple[TrivialBaseline, ...] = ()
    """On the validation split."""
    warning: str = ""
    """The mark of an experiment below the trivial baselines."""
    x_label: str = "optimizer step"
    x_of_step: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    """Arm -> step -> position on another axis than steps; a step that is missing is not drawn."""

    def place(self, curve: LearningCurve) -> LearningCurve | None:
        """Return a curve at its positions on the x axis; None where it has none."""
        if not self.x_of_step:
            return curve
        positions = self.x_of_step.get(curve.arm, {})
        is_placed = np.array([int(step) in positions for step in curve.steps])
        if not is_placed.any():
            return None
        return replace(
            curve,
            steps=np.array([positions[int(step)] for step in curve.steps[is_placed]], dtype=np.float64),
            means=curve.means[is_placed],
            lows=curve.lows[is_placed],
            highs=curve.highs[is_placed],
        )


def draw_learning_curves(
    ax: Axes, curves: Sequence[LearningCurve], styles: Mapping[str, Mapping[str, str]], panel: CurvePanel
) -> None:
    """Draw the curves into the axes; `styles`: colour and line style of each arm."""
    for curve in curves:
        line, color = styles[curve.arm]["linestyle"], styles[curve.arm]["color"]
        ax.plot(curve.steps, curve.means, line, color=color, linewidth=1.6)
        if len(curves) <= MAX_BANDS:
            ax.fill_between(curve.steps, curve.lows, curve.highs, color=color, alpha=0.1, linewidth=0)
    last = max(float(curve.steps[-1]) for curve in curves)
    bottom, top = include_reference(
        find_limits(curves, last), panel.trivial_baselines, panel.metric, lower_is_better=panel.lower_is_better
    )
    visible = [curve.steps[(curve.means >= bottom) & (curve.means <= top)] for curve in curves]
    first = min(float(steps[0]) for steps in visible if len(steps))
    ax.set_xlim(first * 0.95, last)
    ax.set_ylim(bottom, top)
    _label_curves(ax, curves, styles)
    name = panel.metric.replace("_", " ")
    ax.set_ylabel(f"{name} ({'lower' if panel.lower_is_better else 'higher'} is better)")
    ax.set_xlabel(panel.x_label)
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    lines = draw_trivial_lines(ax, panel.trivial_baselines, panel.metric)
    draw_warning(ax, panel.warning)
    ax.set_title("\n".join(filter(None, (describe_bands(curves), lines))), loc="left", color=GREY, fontsize=8)


def find_limits(curves: Sequence[LearningCurve], last: float) -> tuple[float, float]:
    """Return y limits that show the means after the warm-up, and their bands as far as they are close."""
    late = [(curve, curve.steps >= WARM_UP * last) for curve in curves]
    means = np.concatenate([curve.means[is_late] for curve, is_late in late])
    low, high = float(means.min()), float(means.max())
    margin = max(high - low, 1e-3 * abs(high), 1e-9)
    if len(curves) > MAX_BANDS:
        return low - 0.06 * margin, high + 0.06 * margin
    bottoms = np.concatenate([curve.lows[is_late] for curve, is_late in late])
    tops = np.concatenate([curve.highs[is_late] for curve, is_late in late])
    bottom, top = max(float(bottoms.min()), low - margin), min(float(tops.max()), high + margin / 2)
    return bottom - 0.06 * margin, top + 0.06 * margin


def _label_curves(ax: Axes, curves: Sequence[LearningCurve], styles: Mapping[str, Mapping[str, str]]) -> None:
    """Write each arm's name beside its last point, spread so that no two names overlap."""
    (left, _), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    gap = 0.22 * ax.figure.dpi / ax.figure.bbox.height  # 0.22 inches as a share of the figure
    ordered = sorted(curves, key=lambda curve: float(curve.means[-1]))
    positions = spread_labels([(float(curve.means[-1]) - bottom) / (top - bottom) for curve in ordered], gap)
    for curve, position in zip(ordered, positions, strict=True):
        x, y, color = float(curve.steps[-1]), float(curve.means[-1]), styles[curve.arm]["color"]
        is_visible = x >= left and bottom <= y <= top
        arrow = {"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkB": 0, "relpos": (0, 0.5)}
        ax.annotate(
            format_curve_label(curve, is_visible=is_visible),
            xy=(max(x, left), min(max(y, bottom), top)),
            xytext=(1.04, position),
            textcoords="axes fraction",
            va="center",
            color=color,
            arrowprops=arrow if is_visible else None,
            annotation_clip=False,
        )


def format_curve_label(curve: LearningCurve, *, is_visible: bool) -> str:
    """Return the arm's name with its missing seeds, and its last value if that is outside the axes."""
    missing = [f"{curve.num_seeds} of {curve.num_started} seeds"] if curve.num_seeds < curve.num_started else []
    missing += [f"{curve.num_diverged} diverged"] if curve.num_diverged else []
    name = f"{curve.arm} ({', '.join(missing)})" if missing else curve.arm
    return name if is_visible else f"{name}: {curve.means[-1]:.3g} at step {curve.steps[-1]:.0f}"


def describe_bands(curves: Sequence[LearningCurve]) -> str:
    """Return what lines and bands are."""
    if len(curves) > MAX_BANDS:
        return "line: mean over seeds"
    meanings = {"t": "95 % t interval over", "range": "lowest to highest of", "none": "none for"}
    by_band: dict[str, list[LearningCurve]] = {}
    for curve in curves:
        by_band.setdefault(curve.band, []).append(curve)
    parts = []
    for band, group in by_band.items():
        fewest, most = (select(curve.num_seeds for curve in group) for select in (min, max))
        seeds = format_plural(most, "seed") if fewest == most else f"{fewest} to {most} seeds"
        names = "" if len(by_band) == 1 else f" ({', '.join(curve.arm for curve in group)})"
        parts.append(f"{meanings[band]} {seeds}{names}")
    return "line: mean; band: " + "; ".join(parts)
