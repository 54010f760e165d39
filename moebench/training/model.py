"""The whole model of a cell: the task's embedding and head around the backbone."""

from pathlib import Path

from torch import Tensor, nn

from moebench.errors import UsageError
from moebench.models.build import Cost, build_backbone, check_router, cost_of
from moebench.models.transformer import BatchContext, Transformer, init_weights
from moebench.routing.router import ROUTERS, Facts
from moebench.routing.values import LayerRecord
from moebench.schema import CellConfig
from moebench.tasks.task import TASKS, Batch, Task


class Model(nn.Module):
    """Embedding, backbone, head: a batch to outputs and the records of the MoE layers."""

    def __init__(self, embedding: nn.Module, backbone: Transformer, head: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding
        self.backbone = backbone
        self.head = head

    def forward(self, batch: Batch, ctx: BatchContext) -> tuple[Tensor, list[LayerRecord]]:
        """Return what the task's `token_loss` reads, and one record per MoE layer."""
        x_BLD, records = self.backbone(self.embedding(batch.input_BL), ctx)
        return self.head(x_BLD), records


def check_cell(config: CellConfig) -> None:
    """Raise UsageError for what can be known before any data is read: options that do not fit, a refused router."""
    check_router(config)
    facts = ROUTERS.get(config.router.name).facts
    task = TASKS.get(config.task.name, where="task.name")
    if task.facts.causal and not config.allow_noncausal and not _is_causal(config, facts):
        capacity = "" if not facts.causal else " with a capacity (causal when dropless)"
        raise UsageError(
            f"router.name: '{config.router.name}' is not causal{capacity}: {facts.causal_reason}; task"
            f" '{config.task.name}' predicts from the past. Allowed: a causal router, or allow_noncausal=true, which"
            " marks the arm in every table"
        )


def marks_of(config: CellConfig) -> tuple[str, ...]:
    """Return the warnings that every table must show beside this cell's numbers."""
    noncausal = TASKS.get(config.task.name).facts.causal and not _is_causal(
        config, ROUTERS.get(config.router.name).facts
    )
    return ("non-causal",) if noncausal else ()


def build_model(config: CellConfig, task: Task) -> Model:
    """Build the model of a cell; its weights are not drawn yet (see `init_weights`)."""
    backbone = build_backbone(
        config,
        causal=TASKS.get(config.task.name).facts.causal,
        vocab_size=task.vocab_size,
        token_count_V=task.token_count_V,
    )
    return Model(task.embedding(config.model.d_model), backbone, task.head(config.model.d_model))


def initialised_model(config: CellConfig, task: Task) -> Model:
    """Build the model and draw its weights from the cell's seed."""
    model = build_model(config, task)
    init_weights(model, config.seed)
    return model


def model_cost(model: Model, sequence_length: int) -> Cost:
    """Count parameters and forward FLOPs per token of a model."""
    return cost_of(model.backbone, [model.embedding, model.head], sequence_length)


def prepare_task(config: CellConfig, results: Path) -> Task:
    """Return the cell's task with its data ready, from the cache under the results folder where possible."""
    return TASKS.get(config.task.name).item.prepare(config.task, results / "cache")


def _is_causal(config: CellConfig, facts: Facts) -> bool:
    capacity = config.layout.capacity
    queue_by_score = capacity.drop_order == "score"  # a later token with a larger weight takes the slot
    with_capacity = capacity.train is not None or capacity.eval is not None
    if with_capacity and queue_by_score:
        return False
    return facts.is_causal(with_capacity=with_capacity and capacity.drop_order == "router")
