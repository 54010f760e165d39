"""`moebench plan --power`: what the planned seeds can show, before and after there are results."""

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from moebench.analysis import statistics as st
from moebench.analysis.compare.design_report import estimate_spread, find_needed_seeds
from moebench.analysis.compare.experiment import compare_experiment, read_plan
from moebench.analysis.compare.values import Comparison
from moebench.analysis.design.levels import Level, compute_level
from moebench.analysis.design.power import NeededSeeds, count_seeds_for_difference
from moebench.config import to_plain
from moebench.errors import UsageError
from moebench.experiment.grid import Experiment
from moebench.experiment.tuning import select_tuned_cells
from moebench.runs.experiment_record import find_served_experiment, read_records
from moebench.runs.folder import RunFolder
from moebench.runs.result import RunResult
from moebench.tasks.task import TASKS

USUAL_SEEDS = (3, 5, 8, 12)
"""Numbers of seeds that stand beside the planned one."""
MAX_RECORDS, MAX_RUNS = 50, 200
"""Earlier experiments that are searched for one of the same shape, newest first, and runs that are read of one."""


@dataclass(frozen=True, kw_only=True)
class KnownSpread:
    """The SD of paired differences in earlier results."""

    sd: float
    df: float
    mean: float
    """Mean of the baseline."""
    source: str
    """Name of the experiment that has the results."""


@dataclass(frozen=True, kw_only=True)
class PowerRow:
    """What a number of seeds can show."""

    num_seeds: int
    num_runs: int
    is_planned: bool
    detectable_sds: float
    """Smallest true difference that 4 of 5 repeats would show, in SDs of the paired differences."""
    detectable: float | None
    """In the unit of the metric; None without earlier results."""


@dataclass(frozen=True, kw_only=True)
class PlannedPower:
    """The power of an experiment's design."""

    metric: str
    num_comparisons: int
    margin: float
    """Share of the baseline's mean."""
    rows: tuple[PowerRow, ...]
    spread: KnownSpread | None
    seeds_for_margin: int | None
    """Seeds that would show a difference as large as the margin; None without results, or for too many."""
    level: Level
    """Level of verdicts when the seeds of the file are done."""
    needed: Mapping[str, NeededSeeds]
    """Seeds needed by each arm that the results of this experiment leave undecided."""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        spread = asdict(self.spread) if self.spread else None
        return {**asdict(self), "spread": spread, "needed": {arm: asdict(each) for arm, each in self.needed.items()}}


def plan_power(experiment: Experiment, results: Path, margin: float) -> PlannedPower:
    """Return what the planned and other numbers of seeds can show; trains and writes nothing.

    `margin`: a difference of interest, as a share of the baseline's mean. The SD of paired differences is that of the
    experiment's own results, else that of the newest earlier experiment of the same shape in the results folder: the
    same task and model, trained for as many steps on batches of the same size.
    """
    assert experiment.design is not None
    comparison = None
    with contextlib.suppress(UsageError):  # nothing to compare yet
        comparison = compare_experiment(experiment, results)
    spread = _find_spread(experiment, results, comparison)
    planned, num_arms = len(experiment.design.seeds), len(experiment.arms)
    plan, _ = read_plan(experiment, results)
    num_comparisons = max(num_arms - 1, 1)
    numbers = sorted({*USUAL_SEEDS, max(planned, st.MIN_SEEDS), max(len(plan.final), st.MIN_SEEDS)})
    return PlannedPower(
        metric=TASKS.get(experiment.cells[0].config.task.name).facts.metric,
        num_comparisons=num_comparisons,
        margin=margin,
        rows=tuple(
            _build_row(number, num_arms, is_planned=number in (planned, len(plan.final)), spread=spread)
            for number in numbers
        ),
        spread=spread,
        seeds_for_margin=(
            count_seeds_for_difference(round(margin * abs(spread.mean) / spread.sd, 6), num_comparisons)
            if spread
            else None
        ),
        level=compute_level(plan, experiment.design.seeds, num_comparisons),
        needed=find_needed_seeds(comparison) if comparison else {},
    )


def _build_row(num_seeds: int, num_arms: int, *, is_planned: bool, spread: KnownSpread | None) -> PowerRow:
    num_comparisons = max(num_arms - 1, 1)
    detectable_sds = st.smallest_detectable(1.0, num_seeds, num_comparisons)
    assert detectable_sds is not None
    detectable = st.smallest_detectable(spread.sd, num_seeds, num_comparisons, spread.df) if spread else None
    return PowerRow(
        num_seeds=num_seeds,
        num_runs=num_seeds * num_arms,
        is_planned=is_planned,
        detectable_sds=detectable_sds,
        detectable=detectable,
    )


def _find_spread(experiment: Experiment, results: Path, comparison: Comparison | None) -> KnownSpread | None:
    spread = estimate_spread(comparison) if comparison else None
    if comparison and spread:
        mean = next(arm.mean for arm in comparison.arms if arm.arm == comparison.baseline)
        if mean is not None:
            return KnownSpread(sd=spread.sd, df=spread.df, mean=mean, source=experiment.name)
    return _find_spread_of_shape(experiment, results)


def _find_spread_of_shape(experiment: Experiment, results: Path) -> KnownSpread | None:
    """Return the spread of the newest other experiment whose baseline has the shape of this one's."""
    cells = [cell for cell in select_tuned_cells(experiment, results).cells if cell.arm == experiment.baseline]
    shape = _describe_shape(to_plain((cells or experiment.cells)[0].config))
    metric = TASKS.get(experiment.cells[0].config.task.name).facts.metric
    records = [record for record in read_records(results)[0].values() if not find_served_experiment(record)]
    for record in sorted(records, key=_read_time, reverse=True)[:MAX_RECORDS]:
        values = _read_values(record, results, metric, shape)
        baseline = values.pop(str(record.get("baseline")), {})
        spread = st.pool_arms(values, baseline)
        if spread:
            return KnownSpread(sd=spread.sd, df=spread.df, mean=fmean(baseline.values()), source=record["name"])
    return None


def _read_time(record: Mapping[str, Any]) -> float:
    time = record.get("time")
    return float(time) if isinstance(time, int | float) else 0.0


def _read_values(
    record: Mapping[str, Any], results: Path, metric: str, shape: Mapping[str, Any]
) -> dict[str, dict[int, float]]:
    """Return arm -> seed -> final metric of an earlier experiment; nothing for one of another shape."""
    values: dict[str, dict[int, float]] = {}
    for cell in record["cells"][:MAX_RUNS]:
        result = _read_result(results, cell["id"])
        if result is None or result.status != "done" or metric not in result.metrics:
            continue
        arm = str(cell.get("arm", result.arm))
        if arm == record.get("baseline") and _describe_shape(result.config) != shape:
            return {}
        values.setdefault(arm, {})[result.seed] = result.metrics[metric]
    return values


def _read_result(results: Path, cell_id: str) -> RunResult | None:
    try:
        return RunFolder.of(results, cell_id).read_result()
    except UsageError:
        return None


def _describe_shape(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what runs must have in common to vary in the same way over seeds, as far as a configuration says it."""
    task, model, train = (config.get(section) for section in ("task", "model", "train"))
    task_name = task.get("name") if isinstance(task, Mapping) else None
    train = train if isinstance(train, Mapping) else {}
    return {"task": task_name, "model": model, "steps": train.get("steps"), "batch_size": train.get("batch_size")}
