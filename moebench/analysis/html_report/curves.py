"""Learning curves as small multiples: one panel for each arm, with the baseline behind it, over three axes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from moebench.analysis.compare.learning_curve import (
    CurvePanel,
    LearningCurve,
    average_seeds,
    find_limits,
    format_curve_label,
)
from moebench.analysis.compare.shown_arms import find_tone, select_arms
from moebench.analysis.compare.values import Comparison
from moebench.analysis.html_report.report_runs import ReportRun
from moebench.analysis.statistics import Values
from moebench.reporting.formatting import format_signed
from moebench.reporting.html.axis import Axis, Tick
from moebench.runs.journal import Point

WIDTH, HEIGHT = 180, 118
"""Size of the plotting area of a panel, in units of its view box."""
MAX_POINTS = 80
"""Most points of a line; longer lines are drawn with evenly spaced points."""


@dataclass(frozen=True, kw_only=True)
class XAxis:
    """What curves are drawn over."""

    name: str
    label: str
    of_step: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    """Arm -> step -> position; empty: steps themselves."""
    problem: str = ""
    """Why arms cannot be compared on it, as a clause; empty if they can."""


STEPS = XAxis(name="steps", label="optimizer steps")


@dataclass(frozen=True, kw_only=True)
class Panel:
    """The curve of one arm; points as SVG writes them."""

    arm: str
    label: str
    """Name, with the seeds that are missing."""
    tone: str
    line: str
    band: str
    """A polygon; empty for one seed."""
    change: str
    """The difference from the baseline at the end, on the compared split; empty for the baseline."""


@dataclass(frozen=True, kw_only=True)
class CurveChart:
    """The panels of all arms over one axis, on common scales."""

    name: str
    label: str
    problem: str
    panels: tuple[Panel, ...]
    baseline: str
    """The line of the baseline, drawn in each panel."""
    is_point: bool
    """Whether there is a single evaluation, whose line would be invisible."""
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


def build_curves(
    comparison: Comparison, runs: Sequence[ReportRun], axes: Sequence[XAxis] = (STEPS,)
) -> tuple[CurveChart, ...]:
    """Return one chart for each axis that arms have; none before the first evaluation."""
    points: dict[str, dict[int, Sequence[Point]]] = {}
    for run in runs:
        points.setdefault(run.arm, {})[run.seed] = run.points
    curves = []
    for arm in select_arms(comparison):
        curve = average_seeds(arm.arm, points.get(arm.arm, {}), f"eval/{comparison.metric}")
        if curve is not None:
            curves.append(replace(curve, num_diverged=arm.num_diverged))
    charts = []
    for axis in axes:
        panel = CurvePanel(metric=comparison.metric, x_label=axis.label, x_of_step=axis.of_step)
        placed = [on_axis for curve in curves if (on_axis := panel.place(curve))]
        if placed:
            charts.append(_build_chart(comparison, axis, placed))
    return tuple(charts)


def _build_chart(comparison: Comparison, axis: XAxis, curves: Sequence[LearningCurve]) -> CurveChart:
    last = max(float(curve.steps[-1]) for curve in curves)
    low, high = find_limits(curves, last)
    x_axis, y_axis = Axis(low=0.0, high=last * 1.02), Axis(low=low, high=high)
    lines = {curve.arm: _format_points(x_axis, y_axis, curve.steps, curve.means) for curve in curves}
    return CurveChart(
        name=axis.name,
        label=axis.label,
        problem=axis.problem,
        panels=tuple(_build_panel(comparison, curve, lines[curve.arm], x_axis, y_axis) for curve in curves),
        baseline=lines.get(comparison.baseline, ""),
        is_point=max(len(curve.steps) for curve in curves) == 1,
        x_ticks=tuple(x_axis.find_ticks(3)),
        y_ticks=tuple(y_axis.find_ticks(4)),
    )


def _build_panel(comparison: Comparison, curve: LearningCurve, line: str, x_axis: Axis, y_axis: Axis) -> Panel:
    edge = np.concatenate([curve.steps, curve.steps[::-1]])
    band = _format_points(x_axis, y_axis, edge, np.concatenate([curve.highs, curve.lows[::-1]]))
    difference = comparison.find_difference(curve.arm)
    change = None if difference is None else difference.mean
    return Panel(
        arm=curve.arm,
        label=format_curve_label(curve, is_visible=True),
        tone=find_tone(comparison, curve.arm),
        line=line,
        band=band if curve.num_seeds > 1 else "",
        change="" if change is None else format_signed(change),
    )


def _format_points(x_axis: Axis, y_axis: Axis, x: Values, y: Values) -> str:
    """Return points as SVG writes them, y downwards."""
    chosen = np.unique(np.linspace(0, len(x) - 1, min(len(x), 2 * MAX_POINTS)).round().astype(int))
    pairs = ((x_axis.place(float(x[i])), y_axis.place(float(y[i]))) for i in chosen)
    points = [f"{a * WIDTH:.1f},{(1 - b) * HEIGHT:.1f}" for a, b in pairs]
    return " ".join(points if len(points) > 1 else points * 2)  # a line of one point is not drawn
