"""Evaluation on a fixed set: quality and load, deterministic, without gradients."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moebench.models.transformer import BatchContext
from moebench.parallel.mesh import ALONE_MESH, Mesh
from moebench.routing.metrics import LoadCount, label_information, label_table, relative_flops, summarise
from moebench.routing.values import LayerRecord
from moebench.tasks.task import OUT_OF_DOMAIN, Batch, Task
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


@dataclass
class _Tally:
    """What the experts of a model did with some batches, by MoE layer."""

    counts: dict[int | str, LoadCount] = field(default_factory=dict)
    tables: dict[int | str, Tensor] = field(default_factory=dict)

    def add(self, record: LayerRecord, label_T: Tensor, num_labels: int) -> None:
        """Count one layer's record."""
        count, layer = LoadCount.of(record), record.layer
        self.counts[layer] = self.counts[layer] + count if layer in self.counts else count
        self.tables[layer] = self.tables.get(layer, 0) + label_table(record.routing, label_T, num_labels)

    def over(self, mesh: Mesh) -> "_Tally":
        """Return what all processes counted together."""
        return _Tally(
            counts={layer: count.over(mesh.world) for layer, count in self.counts.items()},
            tables={layer: mesh.world.sum(table_YE) for layer, table_YE in self.tables.items()},
        )

    def metrics(self, model: Model) -> dict[str, float]:
        """Return the load metrics."""
        return summarise(list(self.counts.values())) | _flops(model, self.counts) | _information(self.tables)


def _evaluate(model: Model, task: Task, batches: Sequence[Batch], seed: int, device: Any, mesh: Mesh) -> Evaluation:
    sums: dict[str, Tensor] = {}
    trained, held_out = _Tally(), _Tally()
    for whole in batches:
        on_device = _own_part(whole, mesh, model).to(device)
        output, records = model(on_device, batch_context(on_device, training=False, seed=seed))
        for name, value in task.sums(output, on_device).items():
            zeros = torch.zeros(len(task.domains), *value.shape[1:], dtype=torch.float64, device=device)
            sums[name] = sums.get(name, zeros).index_add(0, on_device.domain_B, value.double())
        # The whole batch says it, or processes without a part of it would wait in vain for each other's counts.
        tally = held_out if bool((whole.domain_B >= task.num_trained_domains).any()) else trained
        for record in records:
            tally.add(record, _label_T(on_device, record), task.num_labels or len(task.domains))
    sums = {name: mesh.world.sum(value).cpu() for name, value in sums.items()}
    trained, held_out = trained.over(mesh), held_out.over(mesh)
    outside = {f"{name}/{OUT_OF_DOMAIN}": value for name, value in held_out.metrics(model).items()}
    return Evaluation(
        quality=task.quality(sums),
        load=trained.metrics(model) | outside,
        load_by_layer={str(layer): count.load_E.tolist() for layer, count in trained.counts.items()},
    )


def _label_T(batch: Batch, record: LayerRecord) -> Tensor:
    """Return the label of each token of a layer: its domain where the task has nothing better."""
    if batch.label_BL is not None:
        return batch.label_BL.reshape(-1)
    return batch.domain_B.repeat_interleave(record.routing.num_tokens // max(len(batch.domain_B), 1))


def _information(tables: Mapping[int | str, Tensor]) -> dict[str, float]:
    """Return load/label_information, mean over the layers; nothing where all tokens have one label."""
    found = list(tables.values())
    if not found or int(found[0].any(1).sum()) < 2:
        return {}
    return {"load/label_information": sum(map(label_information, found)) / len(found)}


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
