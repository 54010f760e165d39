"""Evaluation on a fixed set: quality and load, deterministic, without gradients."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moebench.models.transformer import BatchContext
from moebench.parallel.mesh import ALONE_MESH, Mesh
from moebench.routing.metrics import LoadCount, relative_flops, summarise
from moebench.tasks.task import Batch, Task
from moebench.training.labels import LabelCounts, LabelTable, information
from moebench.training.model import Model


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """What an evaluation found."""

    quality: dict[str, float]
    load: dict[str, float]
    """Load metrics, mean over MoE layers; empty for a dense model."""
    load_by_layer: dict[str, list[int]]
    """MoE layer (index of its block) -> assignments of each expert over the whole set."""
    labels: dict[str, LabelTable]
    """Kind of label -> which expert takes which, over the whole set."""

    @property
    def metrics(self) -> dict[str, float]:
        """Quality and load together."""
        return self.quality | self.load


def evaluate(
    model: Model, task: Task, batches: Sequence[Batch], seed: int, device: Any, mesh: Mesh = ALONE_MESH
) -> Evaluation:
    """Run the model over the batches in evaluation mode, then put it back into the mode it was in.

    Every process computes its part of each batch; all get the result of the whole.
    """
    with _evaluating(model):
        return _evaluate(model, task, batches, seed, device, mesh)


def probe(
    model: Model, task: Task, batch_size: int, seed: int, device: Any, mesh: Mesh = ALONE_MESH
) -> dict[str, float]:
    """Return what the task measures on a trained model beside its test split; all processes get the same."""

    def read(whole: Batch) -> Tensor:
        batch = _own_part(whole, mesh, model).to(device)
        x_BLD, _ = model.features(batch, batch_context(batch, training=False, seed=seed))
        return mesh.world.gather(x_BLD)

    with _evaluating(model):
        return task.probe(read, batch_size)


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
    return whole if mesh.size == 1 else whole.part(mesh.share(len(whole.domain_B), model.sequences_together))


def _evaluate(model: Model, task: Task, batches: Sequence[Batch], seed: int, device: Any, mesh: Mesh) -> Evaluation:
    sums: dict[str, Tensor] = {}
    counts: dict[int | str, LoadCount] = {}
    labels = LabelCounts(task.label_kinds())
    for whole in batches:
        on_device = _own_part(whole, mesh, model).to(device)
        output, records = model(on_device, batch_context(on_device, training=False, seed=seed))
        for name, value in task.sums(output, on_device).items():
            zeros = torch.zeros(len(task.domains), *value.shape[1:], dtype=torch.float64, device=device)
            sums[name] = sums.get(name, zeros).index_add(0, on_device.domain_B, value.double())
        for record in records:
            count = LoadCount.of(record)
            counts[record.layer] = counts[record.layer] + count if record.layer in counts else count
        labels.add(on_device, records)
    sums = {name: mesh.world.sum(value).cpu() for name, value in sums.items()}
    counts = {layer: count.over(mesh.world) for layer, count in counts.items()}
    tables = labels.over(mesh.world)
    return Evaluation(
        quality=task.quality(sums),
        load=summarise(list(counts.values())) | _flops(model, counts) | information(tables),
        load_by_layer={str(layer): count.load_E.tolist() for layer, count in counts.items()},
        labels=tables,
    )


def _flops(model: Model, counts: Mapping[int | str, LoadCount]) -> dict[str, float]:
    """Return load/flops, mean over the layers whose experts differ in cost; nothing where all are alike."""
    flops = {layer.layer: layer.bank.flops_per_row_E() for layer in model.backbone.moe_layers()}
    found = [
        relative_flops(count.load_E, flops[layer]) for layer, count in counts.items() if len(set(flops[layer])) > 1
    ]
    return {"load/flops": sum(found) / len(found)} if found else {}


def batch_context(batch: Batch, *, training: bool, seed: int, step: int = 0, micro_batch: int = 0) -> BatchContext:
    """Return what the model may know about a batch besides its vectors."""
    return BatchContext(
        training=training,
        seed=seed,
        step=step,
        token_id_BL=batch.token_id_BL,
        valid_BL=batch.valid_BL,
        domain_B=batch.domain_B,
        label_BL=batch.label_BL,
        span=batch.span,
        micro_batch=micro_batch,
    )
