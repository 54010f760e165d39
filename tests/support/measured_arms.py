"""Arms with planted curves, for tests of comparisons on several axes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from support.comparison_runs import make_cost, make_result

from moebench.analysis.fairness.conditions import RunConditions
from moebench.analysis.fairness.measure import MeasuredArms
from moebench.analysis.fairness.run_curve import RunCurve

ALONE = RunConditions(hardware="cpu", cells_at_a_time=1.0, num_starts=1)
STEPS = (20, 40, 60, 80, 100)


def make_curve(values: Sequence[float], seconds: float = 100.0, flops: float = 1000.0) -> RunCurve:
    """Return a curve of evenly spaced evaluations of 100 steps; `seconds`, `flops`: of the whole run."""
    share_P = np.arange(1, len(values) + 1) / len(values)
    budgets = {"steps": 100 * share_P, "tokens": 800 * share_P, "flops": flops * share_P, "seconds": seconds * share_P}
    return RunCurve(value_P=np.array(values, dtype=np.float64), budgets=budgets)


def make_arms(
    curves: Mapping[str, Sequence[RunCurve]], conditions: Mapping[tuple[str, int], RunConditions] | None = None
) -> MeasuredArms:
    """Return arms, the first of them the baseline, that differ in their curves; seeds are counted from 0."""
    first, *_ = curves
    runs = {
        arm: {seed: _make_run(arm, first, seed, float(curve.value_P[-1])) for seed, curve in enumerate(of_arm)}
        for arm, of_arm in curves.items()
    }
    given = conditions or {}
    return MeasuredArms(
        metric="bits_per_byte",
        lower_is_better=True,
        baseline=first,
        runs=runs,
        curves={arm: dict(enumerate(of_arm)) for arm, of_arm in curves.items()},
        conditions={arm: {s: given.get((arm, s), ALONE) for s in range(len(c))} for arm, c in curves.items()},
        divergence={},
        num_steps=100,
    )


def _make_run(arm: str, baseline: str, seed: int, value: float):
    router = "dense" if arm.startswith(baseline) else "switch"
    params = {"dense": 1e6, "dense_small": 2e6, "dense_large": 8e6}.get(arm, 4e6)
    run = make_result(arm, seed, value, config={"router": {"name": router}}, cost=make_cost(total_params=params))
    return replace(run, validation={"bits_per_byte": value})
