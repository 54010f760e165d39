"""What the arms of an experiment have spent and reached, from its run folders."""

from collections.abc import Sequence
from math import isfinite
from pathlib import Path

from moebench.analysis.compare.experiment import list_trained_cells, read_results
from moebench.analysis.compare.values import Comparison
from moebench.analysis.fairness.conditions import RunConditions, read_conditions
from moebench.analysis.fairness.measure import MeasuredArms
from moebench.analysis.fairness.run_curve import RunCurve, build_run_curve
from moebench.experiment.grid import Experiment
from moebench.runs.cell import Cell
from moebench.runs.folder import RunFolder
from moebench.runs.journal import Point, parse_journal
from moebench.runs.result import RunResult


def measure_experiment(experiment: Experiment, results: Path, comparison: Comparison) -> MeasuredArms:
    """Read results, curves and conditions of the finished runs of an experiment; raise UsageError for damage."""
    return measure_arms(list_trained_cells(experiment, results), results, comparison)


def measure_arms(cells: Sequence[Cell], results: Path, comparison: Comparison) -> MeasuredArms:
    """Read results, curves and conditions of the finished cells; those that have diverged are left out and named."""
    runs: dict[str, dict[int, RunResult]] = {arm.arm: {} for arm in comparison.arms}
    curves: dict[str, dict[int, RunCurve]] = {arm: {} for arm in runs}
    journals: dict[str, list[Point]] = {}
    done = [run for run in read_results(cells, results) if _is_finite(run, comparison.metric)]
    for run in done:
        runs[run.arm][run.seed] = run
        folder = RunFolder.of(results, run.id)
        journals[run.id] = parse_journal(folder.journal, folder.read_record(folder.journal, run) or b"")
        curve = build_run_curve(journals[run.id], run, comparison.metric)
        if curve is not None:
            curves[run.arm][run.seed] = curve
    conditions: dict[str, dict[int, RunConditions]] = {arm: {} for arm in runs}
    by_id = read_conditions(results, journals)
    for run in done:
        conditions[run.arm][run.seed] = by_id[run.id]
    verdicts = {arm: comparison.describe_verdict(arm) for arm in runs if arm != comparison.baseline}
    return MeasuredArms(
        metric=comparison.metric,
        lower_is_better=comparison.lower_is_better,
        baseline=comparison.baseline,
        runs=runs,
        curves=curves,
        conditions=conditions,
        divergence={arm: verdict for arm, verdict in verdicts.items() if "diverged" in verdict},
        num_steps=max((run.step for run in done), default=1),
    )


def _is_finite(run: RunResult, metric: str) -> bool:
    return run.status == "done" and isfinite(run.metrics.get(metric, float("nan")))
