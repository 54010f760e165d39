"""A run with what a probe needs of it: its task, and its model trained, at kept checkpoints, and untrained."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from moebench.analysis.stored_run import StoredRun, find_stored_run
from moebench.errors import UsageError, build_unknown_error
from moebench.models.storageless import build_without_storage
from moebench.routing.router import ROUTERS
from moebench.routing.values import LayerRecord
from moebench.schema import CellConfig
from moebench.tasks.deferred_logits import ModelOutput
from moebench.tasks.task import Batch, Task
from moebench.training.evaluation import batch_context, evaluation_mode, training_precision
from moebench.training.initial_weights.load import load_initial_weights
from moebench.training.model import Model, build_initialised_model, build_model, prepare_task
from moebench.training.train import select_device
from moebench.training.trained_model import load_trained_model, load_weights


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedRun(StoredRun):
    """A run whose model can be evaluated."""

    task: Task

    @classmethod
    def from_task(cls, run: StoredRun, task: Task) -> "TrainedRun":
        """Return a run with the task that it was trained on."""
        return cls(folder=run.folder, cell=run.cell, config=run.config, task=task)

    @classmethod
    def open(cls, results: Path, run: str, plugins: Sequence[str] = ()) -> "TrainedRun":
        """Open the run whose id begins with `run`; raise UsageError for one that cannot be evaluated.

        `plugins`: those that the run needs; the files that its folder names are not executed by themselves.
        """
        stored = find_stored_run(results, run, plugins)
        return cls.from_task(stored, prepare_task(stored.config, results))

    @cached_property
    def device(self) -> torch.device:
        """The device that the run was trained on, where there is one."""
        return select_device(self.config.train)

    def require_layer(self, layer: str | None) -> None:
        """Raise UsageError unless the model has an MoE layer of this name, or none is named."""
        with build_without_storage():
            names = [str(each.name) for each in build_model(self.config, self.task).backbone.moe_layers()]
        if layer is not None and layer not in names:
            raise build_unknown_error("--layer", layer, names)

    def load_model(self) -> Model:
        """Return the model with the weights of the last checkpoint."""
        return load_trained_model(self.config, self.config, self.task, self.folder).to(self.device)

    def load_model_at(self, weights: Path) -> Model:
        """Return the model with the kept weights of an earlier step."""
        return load_weights(build_model(self.config, self.task), weights).to(self.device)

    def build_untrained_model(self, seed: int | None = None) -> Model:
        """Return the model as it was before the first step, or as another seed would draw it without a parent."""
        config = self.config if seed is None else replace(self.config, seed=seed)
        model = build_initialised_model(config, self.task)
        if seed is None:
            load_initial_weights(config, model, self.folder.path.absolute().parents[1])
        return model.to(self.device)


def renumber_domains(batches: Iterable[Batch], domains: Sequence[str], trained: Sequence[str]) -> Iterator[Batch]:
    """Yield batches of a task with the indices that their domains have in the task of a run, for its routers.

    `domains`: of the batches' task. `trained`: of the run's task, with those that it held out. A domain that it lacks
    has the index after all of these, as one held out of training.
    """
    indices = [trained.index(domain) if domain in trained else len(trained) for domain in domains]
    index_D = torch.tensor(indices)
    for batch in batches:
        yield replace(batch, domain_B=index_D[batch.domain_B])


def run_batches(
    model: Model, batches: Iterable[tuple[int, Batch]], config: CellConfig
) -> Iterator[tuple[Batch, ModelOutput, list[LayerRecord]]]:
    """Yield each batch with the output and the records of a model, in evaluation mode and the precision of its run.

    `batches`: with the number of each in its evaluation set, which seeds noise.
    """
    device = next(model.parameters()).device
    for number, batch in batches:
        part = batch.to(device)
        with evaluation_mode(model), training_precision(config.train, device):
            output, records = model(part, batch_context(part, training=False, seed=config.seed, micro_batch=number))
        yield part, output, records


def open_routed_run(
    results: Path, run: str, plugins: Sequence[str], section: str, *, allows_mixture: bool = False
) -> TrainedRun:
    """Open a finished run with experts, for a section of `probe`; raise UsageError for any other.

    `allows_mixture`: whether the router may mix all experts for each token.
    """
    stored = find_stored_run(results, run, plugins)
    form = ROUTERS.get(stored.config.router.name).item.form
    if form.is_dense or (form.is_mixture and not allows_mixture):
        what = "has no experts to choose from" if form.is_dense else "mixes all experts and chooses none"
        raise UsageError(f"--show {section}: the router '{stored.config.router.name}' of run {stored.id} {what}")
    stored.require_done(section)
    torch.set_num_threads(stored.config.train.threads)
    return TrainedRun.from_task(stored, prepare_task(stored.config, results))
