"""Learning curves as small multiples: one panel for each arm, with the baseline behind it, over three axes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from moebench.analysis.compare.learning_curve import LearningCurve, average_seeds, find_limits, format_curve_label
from moebench.analysis.compare.statistics import Values
from moebench.analysis.compare.values import Comparison
from moebench.analysis.html_report.shown_arms import find_tone, select_arms
from moebench.analysis.html_report.stored_runs import StoredRun
from moebench.experiment.plan import BACKWARD
from moebench.reporting.formatting import format_signed
from moebench.reporting.html.axis import Axis, Tick
from moebench.runs.result import RunResult

WIDTH, HEIGHT = 180, 118
"""Of the plotting area of a panel, in units of its view box."""
MAX_POINTS = 80
"""Of a line; longer ones are drawn by evenly spaced points."""
AXES = {
    "tokens": "training tokens",
    "FLOPs": "FLOPs of training, measured",
    "seconds": "seconds of training, at the median step",
}


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
    panels: tuple[Panel, ...]
    baseline: str
    """The line of the baseline, drawn in each panel."""
    is_point: bool
    """There has been one evaluation: a line would not be seen."""
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


def build_curves(comparison: Comparison, runs: Sequence[StoredRun]) -> tuple[CurveChart, ...]:
    """Return one chart for each axis; none before the first evaluation."""
    by_arm: dict[str, dict[int, StoredRun]] = {}
    for run in runs:
        by_arm.setdefault(run.arm, {})[run.seed] = run
    curves = []
    for arm in select_arms(comparison):
        points = {seed: run.points for seed, run in by_arm.get(arm.arm, {}).items()}
        curve = average_seeds(arm.arm, points, f"eval/{comparison.metric}")
        if curve is not None:
            curves.append(replace(curve, num_diverged=arm.num_diverged))
    done = {arm: [run.result for run in seeds.values() if is_done(run.result)] for arm, seeds in by_arm.items()}
    charts = [_build_chart(comparison, name, curves, done) for name in AXES if curves]
    return tuple(chart for chart in charts if chart is not None)


def is_done(result: RunResult | None) -> bool:
    """Return whether there is a result of a run that was trained to its end."""
    return result is not None and result.status == "done"


def _build_chart(
    comparison: Comparison,
    name: str,
    curves: Sequence[LearningCurve],
    done: Mapping[str, Sequence[RunResult | None]],
) -> CurveChart | None:
    """Return the chart over one axis, of the arms that have a finished run which says what a step costs."""
    cost = {curve.arm: _compute_step_cost(name, done.get(curve.arm, ())) for curve in curves}
    shown = [curve for curve in curves if cost[curve.arm]]
    if not shown:
        return None
    x = {curve.arm: curve.steps * cost[curve.arm] for curve in shown}
    low, high = find_limits(shown, max(float(curve.steps[-1]) for curve in shown))
    x_axis = Axis(low=0.0, high=max(float(values[-1]) for values in x.values()) * 1.02)
    y_axis = Axis(low=low, high=high)
    lines = {curve.arm: _format_points(x_axis, y_axis, x[curve.arm], curve.means) for curve in shown}
    panels = []
    for curve in shown:
        edge = np.concatenate([x[curve.arm], x[curve.arm][::-1]])
        band = _format_points(x_axis, y_axis, edge, np.concatenate([curve.highs, curve.lows[::-1]]))
        difference = comparison.find_difference(curve.arm)
        has_change = difference is not None and difference.mean is not None
        panels.append(
            Panel(
                arm=curve.arm,
                label=format_curve_label(curve, is_visible=True),
                tone=find_tone(comparison, curve.arm),
                line=lines[curve.arm],
                band=band if curve.num_seeds > 1 else "",
                change=format_signed(difference.mean) if has_change and difference and difference.mean else "",
            )
        )
    return CurveChart(
        name=name,
        label=AXES[name],
        panels=tuple(panels),
        baseline=lines.get(comparison.baseline, ""),
        is_point=max(len(curve.steps) for curve in shown) == 1,
        x_ticks=tuple(x_axis.find_ticks(3)),
        y_ticks=tuple(y_axis.find_ticks(4)),
    )


def _compute_step_cost(axis: str, results: Sequence[RunResult | None]) -> float:
    """Return what a step of an arm costs on an axis, mean over its finished runs; 0 where it is not known."""
    costs = []
    for result in results:
        assert result is not None
        tokens = result.cost.get("train_tokens", 0.0) / max(result.step, 1)
        flops = tokens * result.cost.get("train_flops_per_token", 0.0) * (1 + BACKWARD)
        costs.append({"tokens": tokens, "FLOPs": flops, "seconds": result.throughput.get("step_s", 0.0)}[axis])
    mean = fmean(costs) if costs else 0.0
    return mean if np.isfinite(mean) else 0.0


def _format_points(x_axis: Axis, y_axis: Axis, x: Values, y: Values) -> str:
    """Return points as SVG writes them, y downwards."""
    chosen = np.unique(np.linspace(0, len(x) - 1, min(len(x), 2 * MAX_POINTS)).round().astype(int))
    pairs = ((x_axis.place(float(x[i])), y_axis.place(float(y[i]))) for i in chosen)
    points = [f"{a * WIDTH:.1f},{(1 - b) * HEIGHT:.1f}" for a, b in pairs]
    return " ".join(points if len(points) > 1 else points * 2)  # a line of one point is not drawn
