"""A finished run with what a probe needs of it: its task, its trained model, and the same model untrained."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from moebench.analysis.specialisation.report import find_run, require_experts
from moebench.config import resolve
from moebench.launch.cell_check import require_unchanged_data
from moebench.registry import load_plugin, require_plugins
from moebench.runs.folder import RunFolder
from moebench.schema import CellConfig
from moebench.tasks.task import Task
from moebench.training.model import Model, build_initialised_model, prepare_task
from moebench.training.train import select_device
from moebench.training.trained_model import load_trained_model


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedRun:
    """A run whose model can be evaluated."""

    folder: RunFolder
    arm: str
    seed: int
    config: CellConfig
    task: Task

    @classmethod
    def open(cls, results: Path, run: str, plugins: Sequence[str] = ()) -> "TrainedRun":
        """Open the run whose id begins with `run`; raise UsageError for one that cannot be evaluated.

        `plugins`: those that the run needs; the files that its folder names are not executed by themselves.
        """
        folder = find_run(results, run)
        cell = folder.read_cell()
        require_experts(folder, cell)
        for plugin in plugins:
            load_plugin(plugin)
        require_plugins(cell["plugins"], cell.get("plugin_digests") or (), f"run {folder.path.name}")
        config = resolve(cell["config"])
        require_unchanged_data(cell, config)
        task = prepare_task(config, results)
        return cls(folder=folder, arm=cell["arm"], seed=cell["seed"], config=config, task=task)

    @cached_property
    def device(self) -> torch.device:
        """Where its models are evaluated."""
        return select_device(self.config.train)

    def load_model(self) -> Model:
        """Return the model with the weights of the last checkpoint."""
        return load_trained_model(self.config, self.config, self.task, self.folder).to(self.device)

    def build_untrained_model(self) -> Model:
        """Return the model as it was before the first step."""
        return build_initialised_model(self.config, self.task).to(self.device)
