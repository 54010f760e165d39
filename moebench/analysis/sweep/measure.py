"""Trained models under other settings: each finished run, evaluated again for each combination of values."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch

from moebench.analysis.compare.experiment import list_trained_cells
from moebench.analysis.sweep.axes import Axis, check_number, has_key, list_settings
from moebench.analysis.sweep.points import LOAD_METRICS, Curve, Point
from moebench.errors import UsageError
from moebench.experiment.grid import Experiment
from moebench.experts.knobs import set_options
from moebench.parallel.mesh import Mesh
from moebench.routing.router import ROUTERS
from moebench.runs.cell import Cell
from moebench.runs.folder import RunFolder
from moebench.runs.result import RunResult
from moebench.tasks.task import TASKS, Task
from moebench.training.evaluation import evaluate, training_precision
from moebench.training.model import compute_model_cost, prepare_task
from moebench.training.train import select_device
from moebench.training.trained_model import apply_evaluation_settings, check_same_parameters, load_trained_model


@dataclass(frozen=True, kw_only=True)
class _ArmPlan:
    """The evaluations of one arm."""

    arm: str
    cells: Sequence[Cell]
    settings: tuple[Mapping[str, str], ...]
    """Settings of each point; empty for an arm without an axis, whose only point is its result as trained."""

    @property
    def is_dense(self) -> bool:
        """Whether it is a dense reference."""
        return ROUTERS.get(self.cells[0].config.router.name).item.form.is_dense


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """One run under one setting."""

    metrics: Mapping[str, float]
    flops: float
    """Per token, as executed."""
    planned: float
    """Per token, of the run as trained."""


def measure(
    experiment: Experiment,
    results: Path,
    axes: Sequence[Axis],
    report_progress: Callable[[str], None] = lambda line: None,
) -> Curve:
    """Evaluate the last checkpoint of each finished cell on the test split under each setting, without training.

    An arm that lacks some axes varies in the others; one that lacks all stands as trained, by its result. Raises
    UsageError before the first evaluation for a key that no arm has or that changes parameters, and when no cell is
    finished.
    """
    check_number(axes)
    facts = TASKS.get(experiment.cells[0].config.task.name).facts
    experiment = replace(experiment, cells=tuple(list_trained_cells(experiment, results)))
    plans, notes = _plan_arms(experiment, results, axes)
    return Curve(
        title=experiment.question or experiment.name,
        metric=facts.metric,
        lower_is_better=facts.lower_is_better,
        axes=tuple(axes),
        points=tuple(point for plan in plans for point in _measure_arm(plan, results, facts.metric, report_progress)),
        notes=tuple(notes),
    )


def _plan_arms(experiment: Experiment, results: Path, axes: Sequence[Axis]) -> tuple[list[_ArmPlan], list[str]]:
    """Return a plan for each arm with finished cells, and notes on what is left out."""
    arms = {arm: [cell for cell in experiment.cells if cell.arm == arm] for arm in experiment.arms}
    plans, notes = [], []
    for axis in axes:
        if not any(has_key(cells[0].config, axis.key) for cells in arms.values()):
            for cells in arms.values():  # says which keys are allowed
                apply_evaluation_settings(cells[0].config, [f"{axis.key}={axis.values[0]}"])
            raise UsageError(f"--vary: no arm of '{experiment.name}' has experts and {axis.key}")
    for arm, cells in arms.items():
        own_axes = [axis for axis in axes if has_key(cells[0].config, axis.key)]
        settings = tuple(list_settings(own_axes)) if own_axes else ({},)
        _check_parameters(cells[0], results, settings)
        done = [cell for cell in cells if RunFolder.of(results, cell.id).state() == "done"]
        if len(done) < len(cells):
            notes.append(f"{arm}: {len(done)} of {len(cells)} cells are done; the others are left out")
        if done:
            plans.append(_ArmPlan(arm=arm, cells=done, settings=settings))
    if not plans:
        raise UsageError(f"{results}: no cell of '{experiment.name}' is done there (train it with `moebench run`)")
    return plans, notes


def _check_parameters(cell: Cell, results: Path, settings: Sequence[Mapping[str, str]]) -> None:
    task = prepare_task(cell.config, results)
    for assignments in filter(None, map(_to_assignments, settings)):
        config = apply_evaluation_settings(cell.config, assignments)
        check_same_parameters(config, cell.config, task, ", ".join(assignments))


def _to_assignments(settings: Mapping[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in settings.items()]


def _measure_arm(plan: _ArmPlan, results: Path, metric: str, report_progress: Callable[[str], None]) -> Iterator[Point]:
    """Yield the points of an arm; those of one without axes are read from its results."""
    task = prepare_task(plan.cells[0].config, results)
    for settings in plan.settings:
        assignments = _to_assignments(settings)
        runs = {
            cell.seed: _evaluate_run(cell, task, results, assignments) if assignments else _read_run(cell, results)
            for cell in plan.cells
        }
        names = [name for name in LOAD_METRICS if all(name in run.metrics for run in runs.values())]
        point = Point(
            arm=plan.arm,
            settings=settings,
            quality={seed: run.metrics[metric] for seed, run in runs.items()},
            flops={seed: run.flops for seed, run in runs.items()},
            load={name: fmean(run.metrics[name] for run in runs.values()) for name in names},
            relative_flops=fmean(run.flops / run.planned for run in runs.values()),
            is_dense=plan.is_dense,
        )
        report_progress(f"{point.label}: {metric} {point.mean:.4f}, {point.mean_flops:,.0f} FLOPs per token")
        yield point


def _read_run(cell: Cell, results: Path) -> _Measured:
    """Return the metrics of a run as trained."""
    result = _read_result(RunFolder.of(results, cell.id))
    planned = result.cost["flops_per_token"]
    return _Measured(metrics=result.metrics, flops=result.cost.get("eval_flops_per_token", planned), planned=planned)


def _read_result(folder: RunFolder) -> RunResult:
    result = folder.read_result()
    if result is None or "flops_per_token" not in result.cost:
        raise UsageError(f"{folder.result}: has no cost of the run as trained; train the cell again")
    return result


def _evaluate_run(cell: Cell, task: Task, results: Path, assignments: list[str]) -> _Measured:
    """Return the metrics of a run under other settings."""
    folder = RunFolder.of(results, cell.id)
    train = cell.config.train
    torch.set_num_threads(train.threads)
    config = apply_evaluation_settings(cell.config, assignments)
    model = load_trained_model(config, cell.config, task, folder)
    names = [assignment.partition("=")[0].removeprefix("router.") for assignment in assignments]
    set_options(model.backbone.moe_layers(), config.router, names)
    device = select_device(train)
    model.to(device)
    batches = task.eval_batches("test", train.batch_size)
    with training_precision(train, device):
        metrics = evaluate(model, task, batches, cell.config.seed, device, Mesh(device=device)).metrics
    planned = compute_model_cost(model, task.sequence_length, task.decoder_length).flops_per_token
    return _Measured(
        metrics=metrics,
        flops=metrics.get("load/flops_per_token", planned),
        planned=_read_result(folder).cost["flops_per_token"],
    )
