"""Evaluation on a fixed set: quality and load, deterministic, without gradients."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moebench.models.transformer import BatchContext
from moebench.parallel.mesh import SINGLE_PROCESS_MESH, Mesh
from moebench.routing.layer_name import LayerName
from moebench.routing.metrics import LoadCount, summarise_load
from moebench.routing.values import LayerRecord
from moebench.schema import TrainConfig
from moebench.tasks.task import OUT_OF_DOMAIN, Batch, Task
from moebench.training.executed_cost import ExecutedCost
from moebench.training.label_tables import LabelCounts, LabelTable, information
from moebench.training.model import Model


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """What an evaluation found."""

    quality: dict[str, float]
    load: dict[str, float]
    """Load metrics, mean over MoE layers; empty for a dense model. They cover the domains of training; those of the
    domains that were held out end in /out_of_domain."""
    load_by_layer: dict[str, list[int]]
    """MoE layer (index of its block) -> assignments of each expert over the domains of training."""
    labels: dict[str, LabelTable]
    """Kind of label -> which expert takes which, over the domains of training."""

    @property
    def metrics(self) -> dict[str, float]:
        """Quality and load together."""
        return self.quality | self.load


def evaluate(
    model: Model, task: Task, batches: Sequence[Batch], seed: int, device: Any, mesh: Mesh = SINGLE_PROCESS_MESH
) -> Evaluation:
    """Run the model over the batches in evaluation mode, then put it back into the mode it was in.

    Every process computes its part of each batch; all get the result of the whole. It is computed in the precision of
    the caller: see `training_precision`.
    """
    with _evaluating(model):
        return _evaluate(model, task, batches, seed, device, mesh)


def probe(
    model: Model, task: Task, batch_size: int, seed: int, device: Any, mesh: Mesh = SINGLE_PROCESS_MESH
) -> dict[str, float]:
    """Return what the task measures on a trained model beside its test split; all processes get the same.

    The vectors are computed in the precision of the caller, what the task makes of them in their own, fp32.
    """
    numbers = itertools.count()
    kind = torch.device(device).type
    precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    def read(whole: Batch) -> Tensor:
        batch = _own_part(whole, mesh, model).to(device)
        with torch.autocast(kind, dtype=precision, enabled=precision is not None):
            ctx = batch_context(batch, training=False, seed=seed, micro_batch=next(numbers))
            x_BLD, _ = model.compute_hidden(batch, ctx)
        return mesh.world.gather(x_BLD.float())

    with _evaluating(model), torch.autocast(kind, enabled=False):
        return task.probe(read, batch_size)


def training_precision(train: TrainConfig, device: torch.device) -> torch.autocast:
    """Return the context that a cell's forward passes run in: a model is evaluated as it was trained."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=train.precision == "bf16")


@contextlib.contextmanager
def _evaluating(model: Model) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _own_part(whole: Batch, mesh: Mesh, model: Model) -> Batch:
    return whole if mesh.size == 1 else whole.part(mesh.split_sequences(len(whole.domain_B), model.sequence_group_size))


@dataclass
class _Tally:
    """What the experts of a model did with some batches."""

    labels: LabelCounts
    execution: ExecutedCost
    counts: dict[LayerName, LoadCount] = field(default_factory=dict)
    """By MoE layer."""

    def add(self, batch: Batch, records: Sequence[LayerRecord]) -> None:
        """Count what the layers did with a batch."""
        for record in records:
            count, layer = LoadCount.from_record(record), record.layer
            self.counts[layer] = self.counts[layer] + count if layer in self.counts else count
        self.labels.add(batch, records)
        self.execution.add(records)

    def over(
        self, mesh: Mesh, model: Model, task: Task
    ) -> tuple[dict[str, float], dict[str, list[int]], dict[str, LabelTable]]:
        """Return the load metrics, each expert's load and the label tables of what all processes counted together."""
        counts = {layer: count.sum_over(mesh.world) for layer, count in self.counts.items()}
        tables = self.labels.over(mesh.world)
        self.execution.share(mesh)
        load = summarise_load(list(counts.values())) | self.execution.metrics(model, task) | information(tables)
        return load, {str(layer): count.load_E.tolist() for layer, count in counts.items()}, tables


def _evaluate(model: Model, task: Task, batches: Sequence[Batch], seed: int, device: Any, mesh: Mesh) -> Evaluation:
    sums: dict[str, Tensor] = {}
    layers = model.backbone.moe_layers()
    trained, held_out = (_Tally(LabelCounts(task.label_kinds()), ExecutedCost(layers)) for _ in range(2))
    for number, whole in enumerate(batches):
        on_device = _own_part(whole, mesh, model).to(device)
        # The number is part of what is drawn: the same draws in every batch would make loads of their own chance.
        ctx = batch_context(on_device, training=False, seed=seed, micro_batch=number)
        output, records = model(on_device, ctx)
        for name, value in task.compute_sums(output, on_device).items():
            zeros = torch.zeros(len(task.domains), *value.shape[1:], dtype=torch.float64, device=device)
            sums[name] = sums.get(name, zeros).index_add(0, on_device.domain_B, value.double())
        # The whole batch says it, or processes without a part of it would wait in vain for each other's counts.
        tally = held_out if bool((whole.domain_B >= task.num_trained_domains).any()) else trained
        tally.add(on_device, records)
    sums = {name: mesh.world.sum(value).cpu() for name, value in sums.items()}
    load, load_by_layer, labels = trained.over(mesh, model, task)
    trained.execution.check_declared()  # a router may serve domains that it was not trained on by other rules
    outside, _, _ = held_out.over(mesh, model, task)
    return Evaluation(
        quality=task.compute_quality(sums),
        load=load | {f"{name}/{OUT_OF_DOMAIN}": value for name, value in outside.items()},
        load_by_layer=load_by_layer,
        labels=labels,
    )


def batch_context(batch: Batch, *, training: bool, seed: int, step: int = 0, micro_batch: int = 0) -> BatchContext:
    """Return what the model may know about a batch besides its vectors.

    `micro_batch`: which one of the step this is, in evaluation which batch of the set: each draws its own noise.
    """
    return BatchContext(
        training=training,
        seed=seed,
        step=step,
        token_id_BL=batch.token_id_BL,
        valid_BL=batch.valid_BL,
        domain_B=batch.domain_B,
        span=batch.span,
        micro_batch=micro_batch,
    )
