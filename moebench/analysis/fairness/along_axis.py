"""The metric of every arm along one axis: steps, tokens, training FLOPs or training seconds."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from moebench.analysis import statistics as st
from moebench.analysis.fairness.conditions import find_time_problem
from moebench.analysis.fairness.measure import MeasuredArms
from moebench.analysis.fairness.run_curve import Axis
from moebench.analysis.fairness.values import AXIS_NAMES
from moebench.reporting.formatting import MISSING, format_count, format_percent, format_with_interval
from moebench.reporting.table import Column, Table

SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)
"""Fractions of the baseline's total budget: the columns of the table."""
AXIS_LABELS: Mapping[Axis, str] = {
    "steps": "optimizer step",
    "tokens": "training tokens",
    "flops": "training FLOPs, as executed",
    "seconds": "seconds of training steps",
}


@dataclass(frozen=True, kw_only=True)
class ArmOnAxis:
    """One arm along an axis."""

    arm: str
    at_share: tuple[tuple[float, ...], ...]
    """For each of `SHARES`, the metric of every seed that was evaluated before it and had not ended."""
    num_seeds: int
    spent: float
    """In all, mean over seeds."""
    curve: tuple[tuple[float, float], ...]
    """Mean over seeds of what was spent and of the metric at each evaluation."""
    steps: tuple[int, ...]
    """Steps of these evaluations."""


@dataclass(frozen=True, kw_only=True)
class AxisValues:
    """All arms along an axis."""

    axis: Axis
    metric: str
    lower_is_better: bool
    baseline: str
    arms: tuple[ArmOnAxis, ...]
    """Arms that measured the axis."""
    problem: str
    """Why the arms cannot be compared on this axis, as a clause; empty if they can."""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values: for each arm its mean curve and the means at shares of the baseline's budget."""
        arms = {
            arm.arm: {
                "spent": arm.spent,
                "curve": [list(point) for point in arm.curve],
                "at_share_of_baseline": {
                    f"{share:g}": fmean(values) if len(values) == arm.num_seeds else None
                    for share, values in zip(SHARES, arm.at_share, strict=True)
                },
            }
            for arm in self.arms
        }
        return {"axis": self.axis, "split": "validation", "problem": self.problem or None, "arms": arms}

    def map_steps(self) -> dict[str, dict[int, float]]:
        """Return arm -> step -> what was spent up to it, for a figure."""
        return {
            arm.arm: {step: spent for step, (spent, _) in zip(arm.steps, arm.curve, strict=True)} for arm in self.arms
        }


def read_along_axis(arms: MeasuredArms, axis: Axis) -> AxisValues:
    """Read all curves along an axis, at shares of what the baseline of the same seed spends in all."""
    rows = [row for arm in arms.runs if (row := _read_arm(arms, arm, axis)) is not None]
    runs = [run for arm in rows for run in arms.conditions[arm.arm].values()]
    return AxisValues(
        axis=axis,
        metric=arms.metric,
        lower_is_better=arms.lower_is_better,
        baseline=arms.baseline,
        arms=tuple(rows),
        problem=find_time_problem(runs) if axis == "seconds" and runs else "",
    )


def _read_arm(arms: MeasuredArms, arm: str, axis: Axis) -> ArmOnAxis | None:
    curves = {seed: curve for seed, curve in arms.curves[arm].items() if axis in curve.budgets}
    if not curves:
        return None
    budgets = {
        seed: total
        for seed in curves
        if seed in arms.curves[arms.baseline] and (total := arms.curves[arms.baseline][seed].total(axis))
    }
    at_share = [
        [value for seed, budget in budgets.items() if (value := curves[seed].read_at(axis, share * budget)) is not None]
        for share in SHARES
    ]
    common = sorted(set.intersection(*({int(step) for step in curve.budgets["steps"]} for curve in curves.values())))
    picked = {seed: np.isin(curve.budgets["steps"], common) for seed, curve in curves.items()}
    spent_P = np.mean([curve.budgets[axis][picked[seed]] for seed, curve in curves.items()], axis=0)
    value_P = np.mean([curve.value_P[picked[seed]] for seed, curve in curves.items()], axis=0)
    return ArmOnAxis(
        arm=arm,
        at_share=tuple(map(tuple, at_share)),
        num_seeds=len(budgets),
        spent=fmean(float(curve.budgets[axis][-1]) for curve in curves.values()),
        curve=tuple((float(spent), float(value)) for spent, value in zip(spent_P, value_P, strict=True)),
        steps=tuple(common),
    )


def build_axis_table(values: AxisValues) -> Table:
    """Return a table with a row for each arm and a column for each share of the baseline's budget."""
    total = next((arm.spent for arm in values.arms if arm.arm == values.baseline), None)
    heads = [
        format_percent(share, 0) if total is None else f"{format_percent(share, 0)}: {format_count(share * total)}"
        for share in SHARES
    ]
    name, metric = AXIS_NAMES[values.axis], values.metric.replace("_", " ")
    notes = [f"Columns: shares of the {name} that {values.baseline} spends in all; {MISSING}: not evaluated there."]
    if values.problem:
        notes.append(f"Not comparable: {values.problem}.")
    return Table(
        title=f"Over {name}: {metric} on the validation split",
        columns=(
            Column(header="arm", align="left", wraps=True),
            *(Column(header=head) for head in heads),
            Column(header=f"{name} in all"),
        ),
        rows=tuple((arm.arm, *_format_cells(arm), format_count(arm.spent)) for arm in values.arms),
        notes=tuple(notes),
        marked=bool(values.problem),
    )


def _format_cells(arm: ArmOnAxis) -> list[str]:
    """Return the mean ± half its interval at each share; a dash unless all seeds have a value there."""
    return [
        format_with_interval(fmean(values), st.mean_interval(values))
        if values and len(values) == arm.num_seeds
        else MISSING
        for values in arm.at_share
    ]
