"""Evaluation of a model on a fixed set: quality, expert load, executed cost and label tables. Deterministic."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moebench.experts.weight_casts import share_casts
from moebench.models.transformer import BatchContext
from moebench.parallel.mesh import SINGLE_PROCESS_MESH, Mesh
from moebench.routing.layer_name import LayerName
from moebench.routing.metrics import LoadCount, sum_counts, summarise_load
from moebench.routing.values import LayerRecord
from moebench.schema import TrainConfig
from moebench.tasks.task import OUT_OF_DOMAIN, Batch, Task
from moebench.training.executed_cost import ExecutedCost
from moebench.training.label_tables import LabelCounts, LabelTable, summarise_information
from moebench.training.model import Model
from moebench.training.precision import matrix_precision


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """The metrics of an evaluation."""

    quality: dict[str, float]
    """Metrics of the task."""
    load: dict[str, float]
    """Load metrics, mean over MoE layers; empty for a dense model. They cover the domains of training; names of those
    over the held-out domains end in /out_of_domain."""
    load_by_layer: dict[str, list[int]]
    """MoE layer -> assignments of each expert, over the domains of training."""
    labels: dict[str, LabelTable]
    """Kind of label -> assignments by label and expert, over the domains of training."""
    is_finite: bool = True
    """Whether the sums that the quality is computed from are finite; equal on all processes."""
    problem: str = ""
    """What is not finite and where it occurs first, in one line; empty if nothing is."""

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of quality and load."""
        return self.quality | self.load


def evaluate(
    model: Model, task: Task, batches: Sequence[Batch], seed: int, device: Any, mesh: Mesh = SINGLE_PROCESS_MESH
) -> Evaluation:
    """Evaluate the model on the batches, in evaluation mode; restore its mode afterwards.

    Every process of the mesh evaluates its part of each batch, and all return the result of the full batches. The
    precision is that of the caller's autocast context (see `training_precision`).
    """
    with evaluation_mode(model):
        return _evaluate(model, task, batches, seed, device, mesh)


def probe(
    model: Model, task: Task, batch_size: int, seed: int, device: Any, mesh: Mesh = SINGLE_PROCESS_MESH
) -> dict[str, float]:
    """Return the metrics that the task computes from the features of a trained model; equal on all processes.

    Features are computed in the precision of the caller's autocast context; the task's own computation is fp32.
    """
    batch_numbers = itertools.count()
    kind = torch.device(device).type
    precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    def compute_features(batch: Batch) -> Tensor:
        batch = select_rank_part(batch, mesh, model).to(device)
        with torch.autocast(kind, dtype=precision, enabled=precision is not None):
            ctx = batch_context(batch, training=False, seed=seed, micro_batch=next(batch_numbers))
            x_BLD, _ = model.compute_hidden(batch, ctx)
        return mesh.world.gather(x_BLD.float())

    with evaluation_mode(model), torch.autocast(kind, enabled=False):
        return task.probe(compute_features, batch_size)


@contextlib.contextmanager
def training_precision(train: TrainConfig, device: torch.device) -> Iterator[None]:
    """Compute in the precision of a cell's forward passes, in training and in evaluation."""
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=train.precision == "bf16")
    with matrix_precision(train, device), autocast:
        yield


@contextlib.contextmanager
def evaluation_mode(model: Model) -> Iterator[None]:
    """Put a model into evaluation mode without gradients; restore its mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), share_casts():
            yield
    finally:
        model.train(was_training)


def select_rank_part(batch: Batch, mesh: Mesh, model: Model) -> Batch:
    """Return the sequences of an evaluation batch that belong to this process."""
    if mesh.size == 1:
        return batch
    return batch.part(mesh.split_sequences(len(batch.domain_B), model.sequence_group_size))


@dataclass
class _ExpertCounts:
    """Label counts, executed cost and load of the experts of a model, summed over batches."""

    labels: LabelCounts
    executed_cost: ExecutedCost
    load: dict[LayerName, LoadCount] = field(default_factory=dict)
    """MoE layer -> load."""

    def add(self, batch: Batch, records: Sequence[LayerRecord]) -> None:
        """Add the records of a batch."""
        for record in records:
            count, layer = LoadCount.from_record(record), record.layer
            self.load[layer] = self.load[layer] + count if layer in self.load else count
        self.labels.add(batch, records)
        self.executed_cost.add(records)

    def sum_over(
        self, mesh: Mesh, model: Model, task: Task
    ) -> tuple[dict[str, float], dict[str, list[int]], dict[str, LabelTable]]:
        """Return the load metrics, the load of each expert and the label tables, over all processes."""
        counts = dict(zip(self.load, sum_counts([*self.load.values()], mesh.world), strict=True))
        tables = self.labels.sum_over(mesh.world)
        self.executed_cost.all_reduce(mesh)
        metrics = summarise_load(list(counts.values())) | self.executed_cost.metrics(model, task)
        load_by_layer = {str(layer): count.load_E.tolist() for layer, count in counts.items()}
        return metrics | summarise_information(tables), load_by_layer, tables


def _evaluate(model: Model, task: Task, batches: Sequence[Batch], seed: int, device: Any, mesh: Mesh) -> Evaluation:
    sums: dict[str, Tensor] = {}
    layers = model.backbone.moe_layers()
    trained, held_out = (_ExpertCounts(LabelCounts(task.label_kinds()), ExecutedCost(layers)) for _ in range(2))
    for number, batch in enumerate(batches):
        part = select_rank_part(batch, mesh, model).to(device)
        # With the same noise in every batch, loads would depend on that noise.
        ctx = batch_context(part, training=False, seed=seed, micro_batch=number)
        output, records = model(part, ctx)
        for name, value in task.compute_sums(output, part).items():
            zeros = torch.zeros(len(task.domains), *value.shape[1:], dtype=torch.float64, device=device)
            sums[name] = sums.get(name, zeros).index_add(0, part.domain_B, value.double())
        # Decided by the full batch, so that all processes take part in the collectives of the same counts.
        counts = held_out if bool((batch.domain_B >= task.num_trained_domains).any()) else trained
        counts.add(part, records)
    sums = {name: mesh.world.sum(value).cpu() for name, value in sums.items()}
    load, load_by_layer, labels = trained.sum_over(mesh, model, task)
    trained.executed_cost.check_experts_per_token()  # only here: held-out domains may be routed by other rules
    held_out_load, _, _ = held_out.sum_over(mesh, model, task)
    return Evaluation(
        quality=task.compute_quality(sums),
        load=load | {f"{name}/{OUT_OF_DOMAIN}": value for name, value in held_out_load.items()},
        load_by_layer=load_by_layer,
        labels=labels,
        is_finite=all(bool(value.isfinite().all()) for value in sums.values()),
    )


def batch_context(batch: Batch, *, training: bool, seed: int, step: int = 0, micro_batch: int = 0) -> BatchContext:
    """Return what the model may use of a batch besides its vectors.

    `micro_batch`: index of the micro-batch within the step, or of the batch within an evaluation set; it seeds noise.
    """
    return BatchContext(
        training=training,
        seed=seed,
        step=step,
        token_id_BL=batch.token_id_BL,
        valid_BL=batch.valid_BL,
        document_BL=batch.document_BL,
        domain_B=batch.domain_B,
        span=batch.span,
        micro_batch=micro_batch,
    )
