"""The trivial baselines of an experiment: read where they are stored, else computed from the data and stored."""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moebench.config import resolve
from moebench.errors import UsageError
from moebench.experiment.grid import Experiment
from moebench.plugin_errors import describe_error
from moebench.runs.cell import Cell
from moebench.runs.experiment_record import lock_records, read_record, write_record
from moebench.runs.folder import RunFolder
from moebench.runs.result import RunResult
from moebench.runs.trivial_baselines import (
    BELOW_TRIVIAL,
    RECORD_KEY,
    EvaluationSet,
    StoredBaselines,
    average_arm,
    is_below_trivial,
    read_recorded,
)
from moebench.schema import CellConfig
from moebench.tasks.baselines.baseline import TrivialBaseline
from moebench.tasks.cache import load_or_create, read_entry
from moebench.tasks.task import TASKS, Task
from moebench.training.model import prepare_task


@dataclass(frozen=True, kw_only=True)
class TrivialBaselines:
    """The baselines of a comparison, or why there are none."""

    baselines: tuple[TrivialBaseline, ...] = ()
    """None where the task has no baselines."""
    problem: str = ""
    """Why they cannot be shown, in one line; empty if they can."""


@dataclass(frozen=True, kw_only=True)
class BaselineSource:
    """A finished run of the baseline arm, whose data and evaluation set the trivial baselines are of."""

    result: RunResult
    config: CellConfig
    plugin_digests: Sequence[str] = ()


def ignore() -> None:
    """Do nothing."""


def find_baselines(
    source: BaselineSource,
    results: Path,
    split: str,
    *,
    record: dict[str, Any] | None = None,
    on_compute: Callable[[], None] = ignore,
) -> TrivialBaselines:
    """Return the trivial baselines of a run's evaluation set, from the record, the cache or the data; never raise.

    `record`: that of the experiment, if there is one. `on_compute` is called before anything is computed.
    """
    if TASKS.get(source.config.task.name).item.compute_baselines is Task.compute_baselines:
        return TrivialBaselines()
    wanted = EvaluationSet.of(source.result, split, source.plugin_digests)
    recorded = {stored.evaluation: stored for stored in read_recorded(record or {})}
    stored = recorded.get(wanted) or _read_cached(results, wanted)
    if stored is None:
        try:
            on_compute()
            stored = _compute(source, results, wanted)
        except Exception as error:  # of the data, their readers or a plug-in: the comparison continues
            problem = str(error) if isinstance(error, UsageError) else describe_error(error)
            stored = _find_older(wanted, recorded.values())
            if stored is None:
                return TrivialBaselines(problem=" ".join(problem.split()))
    return TrivialBaselines(baselines=stored.baselines)


def summarise_baselines(
    experiment: Experiment, results: Path, on_compute: Callable[[], None] = ignore
) -> tuple[str, tuple[str, ...]]:
    """Record the trivial baselines of an experiment; return its mark, empty if it is not below them, and notes."""
    run_results = read_finished(results, experiment.cells)
    source = find_source(experiment.cells, run_results, experiment.baseline)
    if source is None:
        return "", ()
    trivial = record_baselines(results / "experiments" / f"{experiment.name}.json", source, results, on_compute)
    facts = TASKS.get(source.config.task.name).facts
    mean = average_arm(run_results, experiment.baseline, facts.metric)
    is_below = is_below_trivial(mean, trivial.baselines, facts.metric, lower_is_better=facts.lower_is_better)
    notes = (f"no trivial baselines: {trivial.problem}",) if trivial.problem else ()
    return BELOW_TRIVIAL if is_below else "", notes


def is_source_below(source: BaselineSource, mean: float, results: Path, split: str) -> bool | None:
    """Return whether a mean over seeds of runs like the source does not beat the reference; None if it is unknown."""
    facts = TASKS.get(source.config.task.name).facts
    baselines = find_baselines(source, results, split).baselines
    return is_below_trivial(mean, baselines, facts.metric, lower_is_better=facts.lower_is_better)


def record_baselines(
    path: Path, source: BaselineSource, results: Path, on_compute: Callable[[], None] = ignore
) -> TrivialBaselines:
    """Write the trivial baselines of both splits into the record of an experiment; return those of the test split."""
    record = read_record(path)
    by_split = {"test": find_baselines(source, results, "test", record=record, on_compute=on_compute)}
    by_split["validation"] = find_baselines(source, results, "validation", record=record)
    stored = [
        _to_stored(source, EvaluationSet.of(source.result, split, source.plugin_digests), each.baselines).to_dict()
        for split, each in by_split.items()
        if each.baselines
    ]
    if stored and stored != record.get(RECORD_KEY):
        with lock_records(path.parent):  # read again: another runner may have added seeds while these were computed
            write_record(path, {**read_record(path), RECORD_KEY: stored})
    return by_split["test"]


def read_finished(results: Path, cells: Sequence[Cell]) -> list[RunResult]:
    """Return the results of the cells that are done, under the names of their arms; damaged ones are left out."""
    finished = []
    for cell in cells:
        with contextlib.suppress(UsageError):
            result = RunFolder.of(results, cell.id).read_result()
            if result is not None and result.status == "done":
                finished.append(replace(result, arm=cell.arm))
    return finished


def find_source(cells: Sequence[Cell], run_results: Sequence[RunResult], baseline: str) -> BaselineSource | None:
    """Return the first finished run of the baseline arm, else of any arm; None before the first one."""
    cell_of = {cell.id: cell for cell in cells}
    finished = [result for result in run_results if result.status == "done" and result.id in cell_of]
    for result in sorted(finished, key=lambda result: cell_of[result.id].arm != baseline):
        cell = cell_of[result.id]
        return BaselineSource(result=result, config=cell.config, plugin_digests=cell.plugin_digests)
    return None


def find_baselines_of_runs(
    cells: Sequence[Mapping[str, Any]], run_results: Sequence[RunResult], baseline: str, results: Path, split: str
) -> TrivialBaselines:
    """Return the trivial baselines of runs that are given by their `cell.json` and results; never raise."""
    cell_of = {cell["id"]: cell for cell in cells}
    finished = [result for result in run_results if result.status == "done"]
    for result in sorted(finished, key=lambda result: result.arm != baseline):
        cell = cell_of[result.id]
        try:
            config = resolve(cell["config"])
        except UsageError as error:  # of another version, or of a plug-in that is not loaded
            return TrivialBaselines(problem=str(error))
        source = BaselineSource(result=result, config=config, plugin_digests=cell.get("plugin_digests", ()))
        return find_baselines(source, results, split)
    return TrivialBaselines()


def _read_cached(results: Path, wanted: EvaluationSet) -> StoredBaselines | None:
    entry = read_entry(_cache_folder(results, wanted))
    return None if entry is None else _from_entry(entry[0], wanted)


def _cache_folder(results: Path, wanted: EvaluationSet) -> Path:
    return results / "cache" / f"baselines-{wanted.key}"


def _from_entry(meta: dict[str, Any], wanted: EvaluationSet) -> StoredBaselines | None:
    try:
        stored = StoredBaselines.from_dict(meta)
    except (ValueError, TypeError):
        return None
    return stored if stored.evaluation == wanted else None


def _compute(source: BaselineSource, results: Path, wanted: EvaluationSet) -> StoredBaselines:
    """Compute the baselines and cache them; raise UsageError where the data are not those of the run."""
    task = prepare_task(source.config, results)
    if (task.digest, task.eval_digest) != (wanted.data_digest, wanted.eval_digest):
        raise UsageError("the data have changed since the runs were trained")
    with TASKS.get(source.config.task.name).convert_errors("compute_baselines"):
        baselines = tuple(
            replace(baseline, values={name: float(value) for name, value in baseline.values.items()})
            for baseline in task.compute_baselines(wanted.split)
        )
        stored = StoredBaselines.from_dict(_to_stored(source, wanted, baselines).to_dict())  # checks them
    meta, _ = load_or_create(_cache_folder(results, wanted), lambda: (stored.to_dict(), {}))
    return _from_entry(meta, wanted) or stored


def _to_stored(
    source: BaselineSource, evaluation: EvaluationSet, baselines: tuple[TrivialBaseline, ...]
) -> StoredBaselines:
    facts = TASKS.get(source.config.task.name).facts
    return StoredBaselines(
        evaluation=evaluation, metric=facts.metric, lower_is_better=facts.lower_is_better, baselines=baselines
    )


def _find_older(wanted: EvaluationSet, recorded: Iterable[StoredBaselines]) -> StoredBaselines | None:
    """Return recorded baselines of the same evaluation that another version computed: better than none."""
    for stored in recorded:
        if asdict(stored.evaluation) | {"format": 0} == asdict(wanted) | {"format": 0}:
            return stored
    return None
