"""The runs of a ladder of sizes: what every arm spent and reached at each size, next to the baseline."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from statistics import fmean

import numpy as np

from moebench.analysis.compare.experiment import list_trained_cells, read_results
from moebench.analysis.compare.values import ComparisonMetric, Split
from moebench.analysis.fairness.conditions import RunConditions, find_time_problem, read_conditions
from moebench.analysis.pooled.effective_compute import SizePairs
from moebench.analysis.pooled.experiments import name_uniquely
from moebench.analysis.training_flops import compute_training_flops
from moebench.errors import UsageError
from moebench.experiment.axes import ARM
from moebench.experiment.grid import Experiment
from moebench.experiment.trivial_baselines import BaselineSource, is_source_below
from moebench.runs.cell import Cell
from moebench.runs.result import Fault, RunResult
from moebench.tasks.task import TASKS

SCALE_KEYS = ("train.steps", "train.batch_size")
"""Grid keys that make sizes, as all of `model` do; all others make arms."""


@dataclass(frozen=True, kw_only=True)
class LadderSize:
    """All arms at one size, by seed; with runs that failed."""

    name: str
    runs: Mapping[str, Mapping[int, RunResult]]
    """Arm -> seed -> finished run with a finite metric."""
    num_diverged: Mapping[str, int] = field(default_factory=dict)
    is_below_trivial: bool | None = None
    """Whether the baseline does not beat the trivial reference at this size; None if it is unknown."""


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """A ladder of sizes with one task and one baseline."""

    metric: str
    split: Split
    lower_is_better: bool
    baseline: str
    sizes: tuple[LadderSize, ...]
    """Sizes in ascending order of compute."""
    conditions: Mapping[str, RunConditions]
    """Id of a run -> how its time was measured."""
    ignores_conditions: bool = False
    """Whether times that were not measured in the same way are compared."""

    @property
    def arms(self) -> list[str]:
        """Every arm but the baseline."""
        names = dict.fromkeys(arm for size in self.sizes for arm in size.runs)
        return [arm for arm in names if arm != self.baseline]

    @property
    def baseline_flops(self) -> list[float]:
        """Mean training FLOPs of the baseline at each size, ascending."""
        return [fmean(map(_require_flops, size.runs[self.baseline].values())) for size in self.sizes]

    def pair_sizes(self, arm: str) -> list[SizePairs]:
        """Return the pairs of an arm at each size where it has any."""
        return [pairs for size in self.sizes if (pairs := self._pair(size, arm)) is not None]

    def find_time_problem(self, arm: str) -> str:
        """Return why the times of an arm and the baseline cannot be compared at a size; empty if they can."""
        for size in self.sizes:
            runs = [run for name in (arm, self.baseline) for run in size.runs.get(name, {}).values()]
            problem = find_time_problem([self.conditions[run.id] for run in runs]) if runs else ""
            if problem:
                return f"{size.name}: {problem}"
        return ""

    def count_diverged(self, arm: str) -> int:
        """Return the number of runs of an arm and of the baseline that diverged."""
        return sum(size.num_diverged.get(name, 0) for size in self.sizes for name in (arm, self.baseline))

    def _pair(self, size: LadderSize, arm: str) -> SizePairs | None:
        ours, theirs = size.runs.get(arm, {}), size.runs.get(self.baseline, {})
        seeds = [seed for seed in ours if seed in theirs]
        if not seeds:
            return None
        pairs = [(ours[seed], theirs[seed]) for seed in seeds]
        flops = [[_require_flops(run) for run in pair] for pair in pairs]
        log_speeds = None
        if self.ignores_conditions or not self.find_time_problem(arm):
            seconds = [[run.throughput.get("train_s", 0.0) for run in pair] for pair in pairs]
            if all(value > 0 for pair in seconds for value in pair):
                log_speeds = np.log([f[0] / s[0] * s[1] / f[1] for f, s in zip(flops, seconds, strict=True)])
        losses = [[self._read_loss(run) for run in pair] for pair in pairs]
        return SizePairs(
            size=size.name,
            arm_flops=fmean(pair[0] for pair in flops),
            baseline_flops=fmean(pair[1] for pair in flops),
            log_loss_S=np.log([pair[0] for pair in losses]),
            baseline_log_loss_S=np.log([pair[1] for pair in losses]),
            log_speed_S=log_speeds,
        )

    def _read_loss(self, run: RunResult) -> float:
        """Return a positive loss: the metric, or one minus a share where higher is better."""
        value = (run.metrics if self.split == "test" else run.validation)[self.metric]
        loss = value if self.lower_is_better else 1 - value
        if loss <= 0:
            raise UsageError(
                f"effective compute: {self.metric} is {value:g} in {run.id}; allowed: a positive loss, or a share below"
                " 1"
            )
        return loss


def read_ladder(
    experiments: Sequence[Experiment], results: Path, split: Split = "test", *, ignore_conditions: bool = False
) -> Ladder:
    """Read the runs of experiments as a ladder; raise UsageError for several tasks or baselines, and repeated runs."""
    named = name_uniquely(experiments)
    tasks = dict.fromkeys(cell.config.task.name for experiment in experiments for cell in experiment.cells)
    if len(tasks) > 1:
        raise UsageError(f"effective compute: got the tasks {', '.join(tasks)}; allowed: one task at several sizes")
    facts = TASKS.get(next(iter(tasks))).facts
    baselines = {_name_parts(experiment, experiment.baseline)[0]: name for name, experiment in named.items()}
    if len(baselines) > 1:
        given = ", ".join(f"{arm} in {name}" for arm, name in baselines.items())
        raise UsageError(f"effective compute: different baselines ({given}); choose one with baseline=ARM")
    metric = ComparisonMetric(name=facts.metric, lower_is_better=facts.lower_is_better, split=split)
    sizes = [size for name, experiment in named.items() for size in _read_sizes(name, experiment, results, metric)]
    [baseline] = baselines
    kept = [size for size in sizes if size.runs.get(baseline)]
    if not kept:
        raise UsageError(f"{results}: no run of the baseline {baseline} is done yet (train it with `moebench run`)")
    kept.sort(key=lambda size: fmean(map(_require_flops, size.runs[baseline].values())))
    runs = [run for size in kept for of_arm in size.runs.values() for run in of_arm.values()]
    return Ladder(
        metric=facts.metric,
        split=split,
        lower_is_better=facts.lower_is_better,
        baseline=baseline,
        sizes=tuple(kept),
        conditions=read_conditions(results, {run.id: [] for run in runs}),
        ignores_conditions=ignore_conditions,
    )


def _read_sizes(
    experiment_name: str, experiment: Experiment, results: Path, metric: ComparisonMetric
) -> list[LadderSize]:
    """Return a size for each combination of values of the grid keys that make sizes."""
    sizes: dict[str, dict[str, dict[int, RunResult]]] = {}
    diverged: dict[str, Counter[str]] = {}
    cells = {cell.id: cell for cell in list_trained_cells(experiment, results)}
    for run in read_results([*cells.values()], results):
        arm, scale = _name_parts(experiment, run.arm)
        name = f"{experiment_name} ({scale})" if scale else experiment_name
        values = run.metrics if metric.split == "test" else run.validation
        if run.status == "done" and isfinite(values.get(metric.name, float("nan"))):
            sizes.setdefault(name, {}).setdefault(arm, {})[run.seed] = replace(run, arm=arm)
        elif run.fault == Fault.DIVERGED or run.status == "done":
            diverged.setdefault(name, Counter())[arm] += 1
    baseline, _ = _name_parts(experiment, experiment.baseline)
    below = {
        name: _is_below_trivial([*runs.get(baseline, {}).values()], cells, results, metric)
        for name, runs in sizes.items()
    }
    return [
        LadderSize(name=name, runs=runs, num_diverged=diverged.get(name, {}), is_below_trivial=below[name])
        for name, runs in sizes.items()
    ]


def _is_below_trivial(
    runs: Sequence[RunResult], cells: Mapping[str, Cell], results: Path, metric: ComparisonMetric
) -> bool | None:
    """Return whether runs of the baseline at one size do not beat the trivial reference; None if it is unknown."""
    if not runs:
        return None
    cell = cells[runs[0].id]
    source = BaselineSource(result=runs[0], config=cell.config, plugin_digests=cell.plugin_digests)
    mean = fmean((run.metrics if metric.split == "test" else run.validation)[metric.name] for run in runs)
    return is_source_below(source, mean, results, metric.split)


def _name_parts(experiment: Experiment, label: str) -> tuple[str, str]:
    """Return the name of an arm without its size, and its size; the size is empty unless grid keys make it."""
    axes, scale_keys = experiment.axes.get(label, {}), _find_scale_keys(experiment)
    scale = [value for key, value in axes.items() if key in scale_keys]
    if not scale:
        return label, ""
    rest = [value for key, value in axes.items() if key not in scale_keys]
    return ", ".join(rest) or label, ", ".join(scale)


def _find_scale_keys(experiment: Experiment) -> set[str]:
    """Return the grid keys that make sizes: `arm` too, where what it alone determines is of the model or training."""
    keys = {key for axes in experiment.axes.values() for key in axes}
    scale_keys = {key for key in keys if key.startswith("model.") or key in SCALE_KEYS}
    if ARM in keys:
        determined = _find_determined_keys(experiment)
        if determined and all(key.split(".")[0] in ("model", "train") for key in determined):
            scale_keys.add(ARM)
    return scale_keys


def _find_determined_keys(experiment: Experiment) -> set[str]:
    """Return the configuration keys whose value follows from the label of the grid key `arm`."""
    values: dict[str, dict[str, set[str]]] = {}
    for cell in experiment.cells:
        label = experiment.axes.get(cell.arm, {}).get(ARM, "")
        for key, value in cell.varies.items():
            values.setdefault(key, {}).setdefault(label, set()).add(repr(value))
    return {
        key
        for key, by_label in values.items()
        if all(len(of_label) == 1 for of_label in by_label.values()) and len(set.union(*by_label.values())) > 1
    }


def _require_flops(run: RunResult) -> float:
    flops = compute_training_flops(run)
    if flops is None:
        raise UsageError(f"effective compute: {run.id} did not measure its training FLOPs (an earlier version)")
    return flops
