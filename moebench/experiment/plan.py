"""State, parameters, FLOPs and memory of each cell, counted on a model without storage."""

from collections.abc import Callable, Iterator
from math import isfinite
from pathlib import Path
from typing import Any

from moebench.experiment.data_need import DataNeed, compute_data_need
from moebench.experiment.disk import count_disk_bytes
from moebench.experiment.grid import Experiment, ignore_progress
from moebench.experiment.memory import estimate_memory
from moebench.experiment.model_costs import ModelCosts
from moebench.experiment.parents import require_parents
from moebench.experiment.stage_runs import list_earlier_cells
from moebench.experiment.tuning import UNSETTLED, list_tuning_cells, select_tuned_cells
from moebench.models.cost import Cost
from moebench.runs.cell import Cell
from moebench.runs.folder import RunFolder
from moebench.tasks.language import TextTask
from moebench.tasks.task import Task


def plan_cells(
    experiment: Experiment, results: Path, on_progress: Callable[[int, int], None] = ignore_progress
) -> list[dict[str, Any]]:
    """Return one JSON-ready row per cell; prepares the data, because its vocabulary is part of the model.

    Earlier stages and tuning runs come first; arms that have not chosen yet are without an id, at the file's settings.
    `on_progress` is called with the number of cells that are counted and that of all cells.
    """
    costs = ModelCosts(results)
    require_parents([*list_earlier_cells(experiment), *experiment.cells], costs)
    baseline = next(cell for cell in experiment.cells if cell.arm == experiment.baseline)
    return list(_plan_rows(experiment, costs, costs.facts(baseline.config).cost, on_progress))


def _plan_rows(
    experiment: Experiment, costs: ModelCosts, baseline: Cost, on_progress: Callable[[int, int], None]
) -> Iterator[dict[str, Any]]:
    cells = list_planned_cells(experiment, costs.results)
    for number, (cell, is_settled) in enumerate(cells):
        on_progress(number, len(cells))
        facts, tokens = costs.facts(cell.config), costs.train_tokens(cell.config)
        cost = facts.cost
        yield {
            "id": cell.id if is_settled else None,
            **({"stage": cell.stage} if cell.stage else {}),
            "arm": cell.arm,
            "seed": cell.seed,
            "state": cell_state(costs.results, cell) if is_settled else UNSETTLED,
            "marks": list(facts.marks),
            "active_params": cost.active_params,
            "total_params": cost.total_params,
            "flops_per_token": cost.flops_per_token,
            "experts_per_token": cost.experts_per_token,
            "train_passes": cost.train_passes,
            "training_only_flops": cost.training_only_flops,
            "flops_vs_baseline": cost.training_flops / baseline.training_flops - 1,
            "params_vs_baseline": cost.total_params / baseline.total_params - 1,
            "match": cell.config.layout.match,
            "memory_bytes": estimate_memory(cell.config, costs).total_bytes,
            "disk_bytes": count_disk_bytes(cell.config, costs),
            "train_tokens": tokens,
            "train_flops": costs.training_flops(cell.config),
            "tokens_per_active_param": tokens / cost.active_params,
            "tokens_per_param": tokens / cost.total_params,
            **_describe_data(compute_data_need(cell.config, costs.task(cell.config))),
            "overlap": _describe_overlap(costs.task(cell.config)),
        }


def _describe_data(need: DataNeed | None) -> dict[str, Any]:
    """Return what a cell reads of its training split; nothing where the data are generated."""
    if need is None:
        return {"epochs": None}
    return {
        "epochs": need.epochs,
        "max_epochs": need.max_epochs if isfinite(need.max_epochs) else None,
        "read_bytes": need.read_bytes,
        "needed_bytes": need.needed_bytes if isfinite(need.max_epochs) else None,
        "train_split_bytes": need.split_bytes,
    }


def _describe_overlap(task: Task) -> dict[str, Any] | None:
    """Return how many evaluation documents were removed because the training split has them; None where unknown."""
    if not isinstance(task, TextTask) or task.text.overlap is None:
        return None
    counts = task.text.overlap
    removed, documents = map(sum, zip(*counts.values(), strict=True))
    by_domain = {domain: count for domain, (count, _) in counts.items() if count}
    return {"removed": removed, "documents": documents, "removed_by_domain": by_domain}


def list_planned_cells(experiment: Experiment, results: Path) -> list[tuple[Cell, bool]]:
    """Return the runs of earlier stages, those of tuning and the cells, with whether it is certain what is trained.

    It is not certain for arms that have not chosen.
    """
    earlier = [(cell, True) for cell in list_earlier_cells(experiment)]
    if experiment.tuning is None:
        return [*earlier, *((cell, True) for cell in experiment.cells)]
    settled = {(cell.arm, cell.seed): cell for cell in select_tuned_cells(experiment, results).cells}
    final = [settled.get((cell.arm, cell.seed), cell) for cell in experiment.cells]
    tuning = [(cell, True) for cell in list_tuning_cells(experiment)]
    return [*earlier, *tuning, *((cell, (cell.arm, cell.seed) in settled) for cell in final)]


def cell_state(results: Path, cell: Cell) -> str:
    """Return done, failed, resumable or new."""
    return RunFolder.of(results, cell.id).state()
