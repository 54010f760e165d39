"""Trained models under another setting: each finished run, evaluated again for each of the setting's values."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from moebench.analysis import statistics as st
from moebench.analysis.compare.experiment import list_trained_cells
from moebench.errors import UsageError
from moebench.experiment.grid import Experiment
from moebench.parallel.mesh import Mesh
from moebench.routing.router import ROUTERS
from moebench.runs.cell import Cell
from moebench.runs.folder import RunFolder
from moebench.schema import CellConfig
from moebench.tasks.task import TASKS, Task
from moebench.training.evaluation import evaluate, training_precision
from moebench.training.model import compute_model_cost, prepare_task
from moebench.training.train import select_device
from moebench.training.trained_model import apply_evaluation_settings, check_same_parameters, load_trained_model

LOAD_METRICS = ("load/drop_rate", "load/unserved")
"""Measured beside the quality."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A configuration key and the values to evaluate."""

    key: str
    values: tuple[str, ...]

    @classmethod
    def parse(cls, text: str, option: str) -> "Setting":
        """Parse KEY=v1,v2,...; raise UsageError for another form."""
        key, separator, rest = text.partition("=")
        values = tuple(value.strip() for value in rest.split(","))
        if not separator or not key or not all(values):
            raise UsageError(f"{option}: '{text}' is not of the form KEY=v1,v2,... (layout.capacity_factor_eval=0.5,1)")
        if len(set(values)) < len(values):
            raise UsageError(f"{option}: '{text}' names a value twice")
        return cls(key=key, values=values)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One arm at one value of the setting, over its seeds."""

    arm: str
    by: str | None
    """Value of the second setting; None without one, or for arms that do not have it."""
    value: str
    quality: Mapping[int, float]
    """Seed -> metric."""
    load: Mapping[str, float]
    """Means over the seeds."""
    relative_flops: float
    """Forward FLOPs over those of the same arm as trained, dropless: dropped assignments cost nothing."""

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return fmean(self.quality.values())

    @property
    def interval(self) -> st.Interval | None:
        """95 % t interval of the mean; None below three seeds."""
        return st.mean_interval(list(self.quality.values()))

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "arm": self.arm,
            "by": self.by,
            "value": self.value,
            "mean": self.mean,
            "interval": list(self.interval) if self.interval else None,
            "seeds": {str(seed): value for seed, value in self.quality.items()},
            "load": dict(self.load),
            "relative_flops": self.relative_flops,
        }


@dataclass(frozen=True, kw_only=True)
class SettingCurve:
    """The points of all arms, with a note for each arm or cell that is left out."""

    title: str
    metric: str
    lower_is_better: bool
    vary: Setting
    by: Setting | None
    points: tuple[Point, ...]
    notes: tuple[str, ...]

    def group_by_line(self) -> dict[str, list[Point]]:
        """Return line of the figure -> its points."""
        has_several_arms = len({point.arm for point in self.points}) > 1
        lines: dict[str, list[Point]] = {}
        for point in self.points:
            by = f"{self.by.key.split('.')[-1]}={point.by}" if self.by and point.by is not None else ""
            names = (point.arm if has_several_arms or not by else "", by)
            lines.setdefault(", ".join(name for name in names if name), []).append(point)
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "metric": self.metric,
            "lower_is_better": self.lower_is_better,
            "vary": self.vary.key,
            "by": self.by.key if self.by else None,
            "points": [point.to_dict() for point in self.points],
            "notes": list(self.notes),
        }


def measure(
    experiment: Experiment,
    results: Path,
    vary: Setting,
    by: Setting | None = None,
    report_progress: Callable[[str], None] = lambda line: None,
) -> SettingCurve:
    """Evaluate the last checkpoint of each finished cell on the test split under each value, without training.

    Raises UsageError before the first evaluation for a key that no arm has or that changes parameters, and when no cell
    is finished.
    """
    facts = TASKS.get(experiment.cells[0].config.task.name).facts
    experiment = replace(experiment, cells=tuple(list_trained_cells(experiment, results)))
    plans, notes = _plan_arms(experiment, results, vary, by)
    points = [point for plan in plans for point in _measure_arm(plan, results, vary, by, facts.metric, report_progress)]
    return SettingCurve(
        title=experiment.question or experiment.name,
        metric=facts.metric,
        lower_is_better=facts.lower_is_better,
        vary=vary,
        by=by,
        points=tuple(points),
        notes=tuple(notes),
    )


@dataclass(frozen=True, kw_only=True)
class _ArmPlan:
    """The evaluations of one arm."""

    arm: str
    cells: Sequence[Cell]
    by_values: tuple[str | None, ...]


def _plan_arms(
    experiment: Experiment, results: Path, vary: Setting, by: Setting | None
) -> tuple[list[_ArmPlan], list[str]]:
    """Return a plan for each arm with finished cells, and notes on what is left out."""
    arms = {arm: [cell for cell in experiment.cells if cell.arm == arm] for arm in experiment.arms}
    with_key = {arm: cells for arm, cells in arms.items() if _has_key(cells[0].config, vary.key)}
    notes = [f"{arm}: has no experts, or no {vary.key}" for arm in arms if arm not in with_key]
    plans = []
    for arm, cells in (with_key or arms).items():
        by_values = by.values if by and (_has_key(cells[0].config, by.key) or len(with_key) == 1) else (None,)
        _check_parameters(cells[0], results, vary, by, by_values)
        done = [cell for cell in cells if RunFolder.of(results, cell.id).state() == "done"]
        if len(done) < len(cells):
            notes.append(f"{arm}: {len(done)} of {len(cells)} cells are done; the others are left out")
        if done:
            plans.append(_ArmPlan(arm=arm, cells=done, by_values=by_values))
    if not plans:
        raise UsageError(f"{results}: no cell of '{experiment.name}' is done there (`moebench run` makes them)")
    return plans, notes


def _has_key(config: CellConfig, key: str) -> bool:
    section, _, option = key.partition(".")
    has_experts = not ROUTERS.get(config.router.name).item.form.is_dense
    return has_experts and section in ("layout", "router") and hasattr(getattr(config, section), option.split(".")[0])


def _check_parameters(
    cell: Cell, results: Path, vary: Setting, by: Setting | None, by_values: Sequence[str | None]
) -> None:
    task = prepare_task(cell.config, results)
    for by_value in by_values:
        for value in vary.values:
            assignments = _overrides(vary, value, by, by_value)
            config = apply_evaluation_settings(cell.config, assignments)
            check_same_parameters(config, cell.config, task, ", ".join(assignments))


def _overrides(vary: Setting, value: str, by: Setting | None, by_value: str | None) -> list[str]:
    second = [f"{by.key}={by_value}"] if by is not None and by_value is not None else []
    return [f"{vary.key}={value}", *second]


def _measure_arm(
    plan: _ArmPlan,
    results: Path,
    vary: Setting,
    by: Setting | None,
    metric: str,
    report_progress: Callable[[str], None],
) -> list[Point]:
    points = []
    task = prepare_task(plan.cells[0].config, results)
    for by_value in plan.by_values:
        for value in vary.values:
            assignments = _overrides(vary, value, by, by_value)
            runs = {cell.seed: _evaluate_run(cell, task, results, assignments) for cell in plan.cells}
            measured = [name for name in LOAD_METRICS if all(name in metrics for metrics, _ in runs.values())]
            point = Point(
                arm=plan.arm,
                by=by_value,
                value=value,
                quality={seed: metrics[metric] for seed, (metrics, _) in runs.items()},
                load={name: fmean(metrics[name] for metrics, _ in runs.values()) for name in measured},
                relative_flops=fmean(flops for _, flops in runs.values()),
            )
            report_progress(f"{plan.arm}: {', '.join(assignments)}: {metric} {point.mean:.4f}")
            points.append(point)
    return points


def _evaluate_run(cell: Cell, task: Task, results: Path, assignments: list[str]) -> tuple[dict[str, float], float]:
    """Return the metrics of a run under other settings, and its FLOPs over those of the run as trained."""
    folder = RunFolder.of(results, cell.id)
    train = cell.config.train
    torch.set_num_threads(train.threads)
    model = load_trained_model(apply_evaluation_settings(cell.config, assignments), cell.config, task, folder)
    device = select_device(train)
    model.to(device)
    batches = task.eval_batches("test", train.batch_size)
    with training_precision(train, device):
        metrics = evaluate(model, task, batches, cell.config.seed, device, Mesh(device=device)).metrics
    planned = compute_model_cost(model, task.sequence_length, task.decoder_length).flops_per_token
    result = folder.read_result()
    if result is None or "flops_per_token" not in result.cost:
        raise UsageError(f"{folder.result}: has no cost of the run as trained; train the cell again")
    return metrics, metrics.get("load/flops_per_token", planned) / result.cost["flops_per_token"]
