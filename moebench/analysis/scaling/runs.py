"""The runs of experiments as points of the law: one law for each router, the dense runs are part of all of them."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from moebench.analysis.compare.experiment import list_trained_cells
from moebench.analysis.scaling.fit import NUM_COEFFICIENTS, Form, Points, choose_form
from moebench.config import to_plain
from moebench.errors import UsageError
from moebench.experiment.grid import Experiment
from moebench.experiment.trivial_baselines import BaselineSource, is_source_below
from moebench.reporting.formatting import format_count, format_plural
from moebench.routing.router import ROUTERS
from moebench.runs.cell import Cell
from moebench.runs.folder import RunFolder
from moebench.runs.result import RunResult
from moebench.runs.trivial_baselines import BELOW_TRIVIAL
from moebench.schema import CellConfig
from moebench.tasks.task import TASKS, TaskFacts
from moebench.training.utilization import BACKWARD_FACTOR

MIN_DECADES = 1.5
"""Smallest range of training FLOPs: a law fitted to less says little about other sizes."""
MIN_SIZES = 3
MIN_SPARE_RUNS = 2
"""Runs beyond the number of coefficients."""
FREE_LAYOUT_KEYS = ("num_experts", "expert_width")
"""Keys of the layout in which the runs of one law may differ."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """A run with a result, and what was to be trained."""

    config: CellConfig
    result: RunResult
    plugin_digests: Sequence[str] = ()

    @property
    def is_dense(self) -> bool:
        """Whether it has no experts."""
        return ROUTERS.get(self.config.router.name).item.form.is_dense

    @property
    def training_flops(self) -> float:
        """FLOPs of the forward and backward passes, as planned; NaN where they are not recorded."""
        return BACKWARD_FACTOR * self.read_cost("flops_per_token") * self.read_cost("train_tokens")

    def read_cost(self, name: str) -> float:
        """Return a part of the cost, NaN where it is not recorded."""
        return self.result.cost.get(name, math.nan)

    def read_loss(self, metric: str, split: str) -> float:
        """Return the final metric on a split, NaN where it is not recorded."""
        return (self.result.metrics if split == "test" else self.result.validation).get(metric, math.nan)


@dataclass(frozen=True, kw_only=True, eq=False)
class RouterRuns:
    """The finished runs of one router, and the dense ones."""

    label: str
    points: Points
    form: Form | None
    refusal: str
    """Why no law can be fitted, in one line; empty: one can."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ScalingRuns:
    """All routers of experiments."""

    metric: str
    routers: tuple[RouterRuns, ...]
    problems: tuple[str, ...]


def collect_runs(experiments: Sequence[Experiment], results: Path, split: str = "test") -> ScalingRuns:
    """Read the finished runs; raise UsageError where no law can be fitted to any router."""
    facts = _require_loss([cell.config.task.name for each in experiments for cell in each.cells])
    cells = {cell.id: cell for each in experiments for cell in list_trained_cells(each, results)}
    runs = list(_read_runs(cells.values(), results))
    done = [run for run in runs if run.result.status == "done"]
    routers = tuple(_build_routers(done, facts.metric, split))
    fitted = [each for each in routers if not each.refusal]
    if not fitted:
        raise UsageError(
            f"scaling: {routers[0].label}: {routers[0].refusal}"
            if routers
            else _explain_missing_runs(experiments, results)
        )
    return ScalingRuns(
        metric=facts.metric,
        routers=routers,
        problems=(
            *_list_problems(len(cells), runs),
            *(f"{each.label}: no law: {each.refusal}" for each in routers if each.refusal),
            *_mark_sizes([run for run in done if run.is_dense], facts.metric, results, split),
        ),
    )


def _require_loss(task_names: Iterable[str]) -> TaskFacts:
    names = list(dict.fromkeys(task_names))
    if len(names) > 1:
        raise UsageError(f"scaling: the runs have several tasks: {', '.join(names)} (allowed: one)")
    facts = TASKS.get(names[0]).facts
    if not facts.lower_is_better:
        raise UsageError(f"scaling: '{names[0]}' is measured by {facts.metric}; the law is one of losses")
    return facts


def _explain_missing_runs(experiments: Sequence[Experiment], results: Path) -> str:
    names = ", ".join(each.name for each in experiments)
    return f"scaling: {results}: no cell with experts of {names} is done there (train it with `moebench run`)"


def _read_runs(cells: Iterable[Cell], results: Path) -> Iterator[Run]:
    for cell in cells:
        result = RunFolder.of(results, cell.id).read_result()
        if result is not None:
            yield Run(config=cell.config, result=result, plugin_digests=cell.plugin_digests)


def _list_problems(num_cells: int, runs: Sequence[Run]) -> Iterator[str]:
    done = [run for run in runs if run.result.status == "done"]
    num_failed = len(runs) - len(done)
    if num_failed:
        yield f"FAILED: {format_plural(num_failed, 'run')} without a final loss; a law of the others may be too good"
    if num_cells > len(runs):
        yield f"{num_cells - len(runs)} of {num_cells} cells have no result yet"
    if len({run.result.eval_digest for run in done}) > 1:
        yield "the sizes were evaluated on different data or windows, so part of their differences is not of size"


def _mark_sizes(dense: Sequence[Run], metric: str, results: Path, split: str) -> Iterator[str]:
    """Yield a line for each model size at which the dense runs do not beat the trivial reference."""
    sizes: dict[str, list[Run]] = {}
    for run in dense:
        sizes.setdefault(_identify_size(run), []).append(run)
    for runs in sizes.values():
        first, mean = runs[0], fmean(run.read_loss(metric, split) for run in runs)
        source = BaselineSource(result=first.result, config=first.config, plugin_digests=first.plugin_digests)
        if is_source_below(source, mean, results, split):
            yield f"dense with {format_count(first.read_cost('active_params'))} parameters: {BELOW_TRIVIAL}"


def _build_routers(done: Sequence[Run], metric: str, split: str) -> Iterator[RouterRuns]:
    """Yield the runs of each router with its options and its layout's, in the order of the experiments."""
    dense = [run for run in done if run.is_dense]
    groups: dict[str, list[Run]] = {}
    for run in done:
        if not run.is_dense:
            groups.setdefault(_identify(run.config), []).append(run)
    labels = _label_groups([to_plain(group[0].config) for group in groups.values()])
    for label, group in zip(labels, groups.values(), strict=True):
        runs = [*dense, *group]
        points = _build_points(runs, metric, split)
        form = choose_form(points)
        yield RouterRuns(label=label, points=points, form=form, refusal=_find_refusal(points, form, runs))


def _identify(config: CellConfig) -> str:
    """Return what the runs of one law have in common: the options of the router, and of the layout but for its size."""
    plain = to_plain(config)
    layout = {key: value for key, value in plain["layout"].items() if key not in FREE_LAYOUT_KEYS}
    return json.dumps([plain["router"], layout], sort_keys=True)


def _label_groups(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the routers, with the options in which groups of one name differ."""
    flat = [
        {f"{part}.{key}": value for part in ("router", "layout") for key, value in config[part].items()}
        for config in configs
    ]
    labels = []
    for options in flat:
        same_name = [other for other in flat if other["router.name"] == options["router.name"]]
        differing = [
            f"{key}={value}"
            for key, value in options.items()
            if key not in {f"layout.{name}" for name in FREE_LAYOUT_KEYS}
            and any(other.get(key) != value for other in same_name)
        ]
        labels.append(", ".join([options["router.name"], *differing]))
    return labels


def _build_points(runs: Sequence[Run], metric: str, split: str) -> Points:
    sizes = [_identify_size(run) for run in runs]
    numbers = {size: number for number, size in enumerate(dict.fromkeys(sizes))}
    return Points(
        num_params_M=np.array([run.read_cost("active_params") for run in runs], float),
        num_experts_M=np.array([1 if run.is_dense else run.config.layout.num_experts for run in runs], float),
        loss_M=np.array([run.read_loss(metric, split) for run in runs], float),
        size_M=np.array([numbers[size] for size in sizes], float),
    )


def _identify_size(run: Run) -> str:
    return json.dumps(to_plain(run.config.model), sort_keys=True)


def _find_refusal(points: Points, form: Form | None, runs: Sequence[Run]) -> str:
    """Return why no law can be fitted to these runs; an empty string if one can."""
    num_sizes = len(np.unique(points.size_M))
    counts = sorted({int(count) for count in points.num_experts_M})
    flops = [run.training_flops for run in runs]
    for name, value_M in (("loss on this split", points.loss_M), ("cost", points.num_params_M), ("cost", flops)):
        if not np.all(np.isfinite(value_M) & (np.asarray(value_M) > 0)):
            return f"a run has no recorded {name} above 0"
    decades = math.log10(max(flops) / min(flops))
    if form is None:
        return (
            f"{format_plural(len(counts), 'number')} of experts ({', '.join(map(str, counts))}); at least 3, dense is 1"
        )
    if num_sizes < MIN_SIZES:
        return f"{format_plural(num_sizes, 'model size')}; at least {MIN_SIZES}"
    if decades < MIN_DECADES:
        span = f"{format_count(min(flops))} to {format_count(max(flops))} training FLOPs"
        return f"{span} are {decades:.1f} decades of compute; at least {MIN_DECADES}"
    if len(points) < NUM_COEFFICIENTS[form] + MIN_SPARE_RUNS:
        return f"{len(points)} runs for {NUM_COEFFICIENTS[form]} coefficients; at least {MIN_SPARE_RUNS} more"
    for size in np.unique(points.size_M):
        tokens = {
            run.read_cost("train_tokens") for run, of_run in zip(runs, points.size_M, strict=True) if of_run == size
        }
        if len(tokens) > 1:
            numbers = " or ".join(map(format_count, sorted(tokens)))
            return f"models of one size saw {numbers} tokens; the law has no term for that"
    return ""
