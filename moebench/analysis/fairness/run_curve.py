"""The evaluation curve of one run over steps, tokens, training FLOPs and training seconds.

What a step cost is measured by the run: its result has the totals, its journal samples. The samples give the shape of
the cumulated cost, the totals its end. The suffix _P is the axis of the points of a curve.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moebench.analysis.training_flops import compute_training_flops
from moebench.runs.journal import Point
from moebench.runs.result import RunResult

Axis = Literal["steps", "tokens", "flops", "seconds"]
AXES: tuple[Axis, ...] = ("steps", "tokens", "flops", "seconds")
TOLERANCE = 0.02
"""A run that ends this close to a budget has spent it: arms are matched within 2 %."""
Values = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class RunCurve:
    """The metric on the validation split at each evaluation of a finished run, and what training had cost by then."""

    value_P: Values
    budgets: Mapping[Axis, Values]
    """What was spent up to each point; without the axes that the run did not measure."""

    @property
    def num_points(self) -> int:
        """Number of evaluations."""
        return len(self.value_P)

    def total(self, axis: Axis) -> float | None:
        """Return what the whole run spent; None where that is not known."""
        return float(self.budgets[axis][-1]) if axis in self.budgets else None

    def has_spent(self, axis: Axis, budget: float) -> bool:
        """Return whether the run continued until this budget, up to the tolerance."""
        return axis in self.budgets and float(self.budgets[axis][-1]) >= (1 - TOLERANCE) * budget

    def read_at(self, axis: Axis, budget: float) -> float | None:
        """Return the metric at a budget, between evaluations linear in its logarithm; at the end within the tolerance.

        None before the first evaluation and where the run ended earlier: nothing is extrapolated.
        """
        if not self.has_spent(axis, budget):
            return None
        if self.budgets[axis][-1] <= (1 + TOLERANCE) * budget:
            return float(self.value_P[-1])
        if budget < self.budgets[axis][0]:
            return None
        return float(np.interp(np.log(budget), np.log(self.budgets[axis]), self.value_P))


def build_run_curve(points: Sequence[Point], result: RunResult, metric: str) -> RunCurve | None:
    """Return the curve of a finished run; None without a finite evaluation of its last step.

    A step that was recorded again after a resume counts once, with its last values.
    """
    evaluations = {
        point.step: point.metrics
        for point in points
        if isfinite(point.metrics.get(f"eval/{metric}", float("nan"))) and 0 < point.step <= result.step
    }
    if result.step not in evaluations:
        return None
    steps = sorted(evaluations)
    step_P = np.array(steps, dtype=np.float64)
    share_P = step_P / result.step
    budgets: dict[Axis, Values] = {"steps": step_P}
    tokens = result.cost.get("train_tokens", 0.0)
    if tokens > 0:
        budgets["tokens"] = share_P * tokens
    flops = compute_training_flops(result)
    if flops is not None:
        rates = _select_rates(points, "train/load/flops_per_token")
        budgets["flops"] = flops * _cumulate(rates, step_P, result.step)
    seconds_P = _read_seconds([evaluations[step] for step in steps])
    total_s = result.throughput.get("train_s", 0.0)
    if seconds_P is not None:
        budgets["seconds"] = seconds_P
    elif total_s > 0:  # of an earlier version, whose evaluations do not have the time
        speeds = _select_rates(points, "train/tokens_per_s")
        budgets["seconds"] = total_s * _cumulate({s: 1 / v for s, v in speeds.items()}, step_P, result.step)
    value_P = np.array([evaluations[step][f"eval/{metric}"] for step in steps], dtype=np.float64)
    return RunCurve(value_P=value_P, budgets=budgets)


def _select_rates(points: Sequence[Point], name: str) -> dict[int, float]:
    """Return step -> positive finite value of a metric of logged steps."""
    values = {point.step: point.metrics[name] for point in points if name in point.metrics}
    return {step: value for step, value in sorted(values.items()) if isfinite(value) and value > 0 and step > 0}


def _cumulate(rates: Mapping[int, float], step_P: Values, num_steps: int) -> Values:
    """Return the share of the total cost that was spent up to each step; `rates`: logged step -> cost of such a step.

    A logged step stands for those since the one before; without any, all steps cost the same.
    """
    if not rates:
        return step_P / num_steps
    logged_L = np.array([0, *rates], dtype=np.float64)
    cost_L = np.concatenate([[0.0], np.cumsum(np.diff(logged_L) * np.array(list(rates.values())))])
    if logged_L[-1] < num_steps:
        logged_L = np.append(logged_L, num_steps)
        cost_L = np.append(cost_L, cost_L[-1] + (num_steps - logged_L[-2]) * list(rates.values())[-1])
    return np.asarray(np.interp(step_P, logged_L, cost_L / cost_L[-1]), dtype=np.float64)


def _read_seconds(evaluations: Sequence[Mapping[str, float]]) -> Values | None:
    """Return the recorded seconds at each evaluation; None unless all have them and they increase."""
    second_P = np.array([metrics.get("time/train_s", np.nan) for metrics in evaluations], dtype=np.float64)
    is_usable = bool(np.isfinite(second_P).all()) and second_P[0] > 0 and bool((np.diff(second_P) > 0).all())
    return second_P if is_usable else None
