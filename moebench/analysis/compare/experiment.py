"""The comparison and the figure of an experiment, from its run folders."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moebench.analysis.compare.comparison import compare
from moebench.analysis.compare.tuning import build_failed_results
from moebench.analysis.compare.values import Comparison, ComparisonMetric, Split
from moebench.analysis.design.protocol import Protocol
from moebench.errors import UsageError
from moebench.experiment.grid import Experiment
from moebench.experiment.seed_plan import SeedPlan, Seeds, find_seed_plan, list_added_cells
from moebench.experiment.trivial_baselines import TrivialBaselines, find_baselines, find_source
from moebench.experiment.tuning import TuningState, read_tuning, select_tuned_cells
from moebench.runs.cell import Cell
from moebench.runs.experiment_record import read_record
from moebench.runs.folder import RunFolder
from moebench.runs.journal import read_journal
from moebench.runs.result import RunResult
from moebench.runs.trivial_baselines import BELOW_TRIVIAL, average_arm, is_below_trivial
from moebench.tasks.task import TASKS


def read_results(cells: Sequence[Cell], results: Path) -> list[RunResult]:
    """Return the results of the cells that have one, under the names of their arms here."""
    run_results = []
    for cell in cells:
        result = RunFolder.of(results, cell.id).read_result()
        if result is not None:
            run_results.append(replace(result, arm=cell.arm))
    return run_results


def compare_experiment(
    experiment: Experiment,
    results: Path,
    *,
    allow_mismatch: bool = False,
    split: Split = "test",
    margin: float | None = None,
    with_added_seeds: bool = True,
) -> Comparison:
    """Compare the arms of an experiment by its task's metric; raise UsageError when there is nothing to compare.

    `margin`: share of the baseline's mean below which arms are equivalent; None takes that of the experiment.
    `with_added_seeds`: whether arms have the seeds that were added to undecided ones, which its record names.
    """
    facts = TASKS.get(experiment.cells[0].config.task.name).facts
    state = read_tuning(experiment, results)
    plan, plan_notes = read_plan(experiment, results)
    cells = _list_cells(experiment, results, plan.added if with_added_seeds else {})
    run_results = read_results(cells, results)
    if state is not None:
        run_results += build_failed_results(state, cells)
    _require_results(run_results, experiment, results, state)
    comparison = compare(
        run_results,
        expected=[(cell.arm, cell.seed, cell.id) for cell in cells],
        baseline=experiment.baseline,
        metric=ComparisonMetric(
            name=facts.metric,
            lower_is_better=facts.lower_is_better,
            split=split,
            margin=experiment.margin if margin is None else margin,
        ),
        allow_mismatch=allow_mismatch,
        protocol=_describe_protocol(experiment, state, plan),
    )
    trivial = find_trivial_baselines(experiment, cells, results, run_results, split)
    return replace(
        comparison,
        notes=(*comparison.notes, *plan_notes),
        trivial_baselines=trivial.baselines,
        trivial_problem=trivial.problem,
        tuning=state,
        axes={arm: experiment.axes.get(arm, {}) for arm in experiment.arms},
        varies={cell.arm: cell.varies for cell in cells},
    )


def _require_results(
    run_results: Sequence[RunResult], experiment: Experiment, results: Path, state: TuningState | None
) -> None:
    if not run_results:
        tuned = f"; {state.describe_progress()}" if state is not None else ""
        raise UsageError(
            f"{results}: no cell of '{experiment.name}' has a result there yet (train it with `moebench run`){tuned}"
        )


def _describe_protocol(experiment: Experiment, state: TuningState | None, plan: SeedPlan) -> Protocol:
    keys = state.keys if state is not None else ()
    return Protocol(tuned_keys=keys, plan=plan, has_several_data=experiment.has_several_data)


def _list_cells(experiment: Experiment, results: Path, added: Mapping[str, Seeds]) -> list[Cell]:
    """Return the cells of the file, as tuning has settled them, and those of the added seeds."""
    settled = {(cell.arm, cell.seed): cell for cell in select_tuned_cells(experiment, results).cells}
    cells = [
        settled.get((cell.arm, cell.seed)) or replace(cell, id=f"not tuned yet: {cell.arm}, seed {cell.seed}")
        for cell in experiment.cells
    ]
    return cells + list_added_cells([cell for cell in cells if (cell.arm, cell.seed) in settled], added)


def list_trained_cells(experiment: Experiment, results: Path) -> list[Cell]:
    """Return the cells that are compared: those that tuning has settled, and those of seeds that were added."""
    cells = list(select_tuned_cells(experiment, results).cells)
    return cells + list_added_cells(cells, read_plan(experiment, results)[0].added)


def read_plan(experiment: Experiment, results: Path) -> tuple[SeedPlan, list[str]]:
    """Return the planned seeds of an experiment, and a note where its record of them cannot be read."""
    path = results / "experiments" / f"{experiment.name}.json"
    if not os.path.lexists(path):
        return find_seed_plan(None, experiment.design), []
    try:
        return find_seed_plan(read_record(path), experiment.design), []
    except UsageError as error:  # else every look would seem to be planned
        return replace(find_seed_plan(None, experiment.design), is_lost=True), [str(error)]


def find_trivial_baselines(
    experiment: Experiment, cells: Sequence[Cell], results: Path, run_results: Sequence[RunResult], split: Split
) -> TrivialBaselines:
    """Return the trivial baselines of an experiment, which are computed where they are not stored; never raise.

    `cells`: those that were trained, which tuning has settled.
    """
    source = find_source(cells, run_results, experiment.baseline)
    if source is None:
        return TrivialBaselines()
    record = None
    with contextlib.suppress(UsageError):  # no record, or a damaged one, which `moebench verify` reports
        record = read_record(results / "experiments" / f"{experiment.name}.json")
    return find_baselines(source, results, split, record=record)


def draw_experiment(
    experiment: Experiment,
    results: Path,
    file: Path,
    comparison: Comparison | None,
    x_axis: tuple[str, Mapping[str, Mapping[int, float]]] | None = None,
) -> Path | None:
    """Draw the validation curves of every arm that has any; return the file, or None without a single point.

    `x_axis`: label, and arm -> step -> position, of another axis than steps.
    """
    from moebench.analysis.compare.figure import draw_comparison  # matplotlib, which a table does not need
    from moebench.analysis.compare.learning_curve import CurvePanel

    journals: dict[str, dict[int, Any]] = {}
    cells = list_trained_cells(experiment, results)
    for cell in cells:
        folder = RunFolder.of(results, cell.id)
        points, _ = read_journal(folder.journal)
        folder.require_unchanged(folder.journal)
        if points:
            journals.setdefault(cell.arm, {})[cell.seed] = points
    facts = TASKS.get(experiment.cells[0].config.task.name).facts
    metric = f"eval/{facts.metric}"
    if not any(metric in point.metrics for seeds in journals.values() for run in seeds.values() for point in run):
        return None
    run_results = read_results(cells, results)
    baselines = find_trivial_baselines(experiment, cells, results, run_results, "validation").baselines
    if comparison is None:  # a failed or unmatched one: the mark does not depend on it
        mean = average_arm(run_results, experiment.baseline, facts.metric, "validation")
        is_below = is_below_trivial(mean, baselines, facts.metric, lower_is_better=facts.lower_is_better)
    else:
        is_below = comparison.is_below_trivial
    panel = CurvePanel(
        metric=facts.metric,
        lower_is_better=facts.lower_is_better,
        trivial_baselines=baselines,
        warning=BELOW_TRIVIAL if is_below else "",
    )
    return draw_comparison(
        journals,
        replace(panel, x_label=x_axis[0], x_of_step=x_axis[1]) if x_axis else panel,
        path=file,
        title=experiment.question or experiment.name,
        comparison=comparison,
    )
