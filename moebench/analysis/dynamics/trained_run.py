"""A finished run with experts, ready to be probed: its configuration, its data and its weights at every kept step."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moebench.analysis.specialisation.report import find_run
from moebench.config import cell_id, resolve
from moebench.errors import UsageError
from moebench.launch.cell_check import require_unchanged_data
from moebench.registry import load_plugin, require_plugins
from moebench.routing.router import ROUTERS
from moebench.runs.folder import RunFolder, list_run_folders
from moebench.schema import CellConfig
from moebench.tasks.task import Task
from moebench.training.model import Model, build_initialised_model, build_model, prepare_task
from moebench.training.train import select_device
from moebench.training.trained_model import load_trained_model, load_weights


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedRun:
    """A finished run and the task that it was trained on."""

    folder: RunFolder
    cell: dict[str, Any]
    config: CellConfig
    task: Task

    @property
    def device(self) -> torch.device:
        """The device that the run was trained on, where there is one."""
        return select_device(self.config.train)

    def load(self) -> Model:
        """Return the trained model."""
        return load_trained_model(self.config, self.config, self.task, self.folder).to(self.device).eval()

    def load_at(self, weights: Path) -> Model:
        """Return the model with the kept weights of an earlier step."""
        return load_weights(build_model(self.config, self.task), weights).to(self.device).eval()

    def build_untrained(self, seed: int | None = None) -> Model:
        """Return the model before its first step, or as another seed would draw it."""
        config = self.config if seed is None else replace(self.config, seed=seed)
        return build_initialised_model(config, self.task).to(self.device).eval()


def open_run(
    results: Path, run: str, plugins: Sequence[str] = (), section: str = "", *, allows_mixture: bool = False
) -> TrainedRun:
    """Return a finished run with experts, for a section of `probe`.

    `allows_mixture`: whether the router may mix all experts for each token. Raises UsageError for any other run, for a
    plug-in that is not given, and where the data was changed since.
    """
    folder = find_run(results, run)
    for plugin in plugins:
        load_plugin(plugin)
    cell, config = _read_config(folder)
    form = ROUTERS.get(config.router.name).item.form
    if form.is_dense or (form.is_mixture and not allows_mixture):
        what = "has no experts to choose from" if form.is_dense else "mixes all experts and chooses none"
        raise UsageError(f"--show {section}: the router '{config.router.name}' of run {folder.path.name} {what}")
    if folder.state() != "done":
        raise UsageError(f"--show {section}: run {folder.path.name} is {folder.state()}, allowed: a run that is done")
    torch.set_num_threads(config.train.threads)
    return TrainedRun(folder=folder, cell=cell, config=config, task=prepare_task(config, results))


def _read_config(folder: RunFolder) -> tuple[dict[str, Any], CellConfig]:
    cell = folder.read_cell()
    require_plugins(cell["plugins"], cell.get("plugin_digests") or (), f"run {folder.path.name}")
    config = resolve(cell["config"])
    require_unchanged_data(cell, config)
    return cell, config


def find_other_seeds(run: TrainedRun, results: Path) -> list[TrainedRun]:
    """Return the finished runs that differ from a run in their seed alone, by seed; those that are damaged are left."""
    own_id = _id_with_seed(run.cell, run.config, run.config.seed)
    others = []
    for folder in list_run_folders(results):
        try:
            stored = folder.read_cell()
            if stored["config"].get("router", {}).get("name") != run.config.router.name or folder.state() != "done":
                continue
            cell, config = _read_config(folder)
        except UsageError:
            continue
        if config.seed != run.config.seed and _id_with_seed(cell, config, run.config.seed) == own_id:
            others.append(replace(run, folder=folder, cell=cell, config=config))
    return sorted(others, key=lambda other: other.config.seed)


def _id_with_seed(cell: dict[str, Any], config: CellConfig, seed: int) -> str:
    """Return the id that the cell would have with another seed."""
    return cell_id(replace(config, seed=seed), cell["data"]["digest"], cell.get("plugin_digests") or ())
