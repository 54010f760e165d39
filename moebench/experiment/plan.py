"""State, parameters and FLOPs of each cell, counted on a model without storage."""

from pathlib import Path
from typing import Any

import torch

from moebench.compatibility import list_marks
from moebench.experiment.grid import Experiment
from moebench.models.cost import Cost
from moebench.runs.cell import Cell
from moebench.runs.folder import RunFolder
from moebench.tasks.task import Task
from moebench.training.batches import count_train_tokens
from moebench.training.model import build_model, compute_model_cost, prepare_task

BACKWARD = 2
"""FLOPs of the backward pass over those of the forward pass."""


def plan_cells(experiment: Experiment, results: Path) -> list[dict[str, Any]]:
    """Return one JSON-ready row per cell; prepares the data, because its vocabulary is part of the model."""
    tasks = {cell.arm: prepare_task(cell.config, results) for cell in experiment.cells}
    costs = {cell.arm: cell_cost(cell, tasks[cell.arm]) for cell in experiment.cells}
    tokens = {cell.id: count_train_tokens(cell.config, tasks[cell.arm]) for cell in experiment.cells}
    baseline = costs[experiment.baseline]
    return [
        {
            "id": cell.id,
            "arm": cell.arm,
            "seed": cell.seed,
            "state": cell_state(results, cell),
            "marks": list(list_marks(cell.config)),
            "active_params": costs[cell.arm].active_params,
            "total_params": costs[cell.arm].total_params,
            "flops_per_token": costs[cell.arm].flops_per_token,
            "experts_per_token": costs[cell.arm].experts_per_token,
            "train_passes": costs[cell.arm].train_passes,
            "training_only_flops": costs[cell.arm].training_only_flops,
            "flops_vs_baseline": costs[cell.arm].training_flops / baseline.training_flops - 1,
            "params_vs_baseline": costs[cell.arm].total_params / baseline.total_params - 1,
            "match": cell.config.layout.match,
            "train_tokens": tokens[cell.id],
            "train_flops": (1 + BACKWARD) * costs[cell.arm].training_flops * tokens[cell.id],
        }
        for cell in experiment.cells
    ]


def cell_state(results: Path, cell: Cell) -> str:
    """Return done, failed, resumable or new."""
    return RunFolder.of(results, cell.id).state()


def cell_cost(cell: Cell, task: Task) -> Cost:
    """Return the cost of a cell's model without allocating its weights."""
    with torch.device("meta"):
        model = build_model(cell.config, task)
    return compute_model_cost(model, task.sequence_length, task.decoder_length)
