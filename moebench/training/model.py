"""The whole model of a cell: the task's embedding and head around the backbone."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from moebench.models.build import build_backbone
from moebench.models.cost import Cost, cost_of, count_flops
from moebench.models.encoder_decoder import EncoderDecoder
from moebench.models.shared_embedding import SharedEmbedding
from moebench.models.transformer import BatchContext, Transformer, init_weights
from moebench.parallel.expert_sharding import shard_experts
from moebench.parallel.mesh import SINGLE_PROCESS_MESH, Mesh
from moebench.routing.router import ROUTERS
from moebench.routing.values import LayerRecord
from moebench.schema import CellConfig
from moebench.tasks.task import TASKS, Batch, Task


class Model(nn.Module):
    """Embedding, backbone, head: a batch to outputs and the records of the MoE layers."""

    def __init__(
        self,
        embedding: nn.Module,
        backbone: Transformer | EncoderDecoder,
        head: nn.Module,
        shared: SharedEmbedding | None = None,
    ) -> None:
        """`shared`: what all routers read beside their layer's input; None: nothing."""
        super().__init__()
        self.embedding = embedding
        self.backbone = backbone
        self.head = head
        self.shared = shared

    def forward(self, batch: Batch, ctx: BatchContext) -> tuple[Tensor, list[LayerRecord]]:
        """Return what the task's `loss` reads, and one record per MoE layer."""
        x_BLD, records = self.features(batch, ctx)
        return self.head(x_BLD), records

    @property
    def sequence_group_size(self) -> int:
        """Sequences that must be on the same process (see `Router.sequence_group_size`)."""
        routers = [layer.router for layer in self.backbone.moe_layers()]
        return max((router.sequence_group_size(router.config) for router in routers), default=1)

    def compute_hidden(self, batch: Batch, ctx: BatchContext) -> tuple[Tensor, list[LayerRecord]]:
        """Return the vectors that the head reads, and the records."""
        x_BLD = self.embedding(batch.input_BL)
        if isinstance(self.backbone, EncoderDecoder):
            own = replace(ctx, token_id_BL=batch.decoder_input_BP, valid_BL=batch.decoder_valid_BP, label_BL=None)
            found: tuple[Tensor, list[LayerRecord]] = self.backbone(
                x_BLD, ctx, self.embedding(batch.decoder_input_BP), own
            )
        else:
            found = self.backbone(x_BLD, ctx if self.shared is None else replace(ctx, embedding_BLD=self.shared(x_BLD)))
        return found

    def said_by_shared(self, batch: Batch) -> Tensor:
        """Return what the task's `loss` reads, of the shared embedding alone: it learns by that."""
        assert self.shared is not None
        output: Tensor = self.shared.head(self.shared(self.embedding(batch.input_BL)))
        return output


def build_model(config: CellConfig, task: Task, sized_as: CellConfig | None = None) -> Model:
    """Build the model of a cell; its weights are not drawn yet (see `init_weights`).

    `sized_as`: the cell whose experts' widths it has; None: its own.
    """
    facts = TASKS.get(config.task.name).facts
    build = partial(
        build_backbone,
        config,
        vocab_size=task.vocab_size,
        token_count_V=task.token_count_V,
        token_pairs=task.token_pairs if task.token_count_V is not None else None,
        num_domains=task.num_trained_domains,
        sized_as=sized_as,
    )
    backbone: Transformer | EncoderDecoder
    if facts.is_encoder_decoder:
        backbone = EncoderDecoder(
            build(causal=False, sequence_length=task.sequence_length, half="encoder"),
            build(causal=True, sequence_length=task.decoder_length, half="decoder"),
        )
    else:
        backbone = build(causal=facts.causal, sequence_length=task.sequence_length)
    d_model, (width, _) = config.model.d_model, ROUTERS.get(config.router.name).item.embedding(config.router)
    shared = SharedEmbedding(d_model, width, task.build_head(width)) if width else None
    return Model(task.build_embedding(d_model), backbone, task.build_head(d_model), shared)


def initialised_model(config: CellConfig, task: Task, mesh: Mesh = SINGLE_PROCESS_MESH) -> Model:
    """Build the model, as one of the mesh's processes has it, and draw its weights from the cell's seed."""
    model = build_model(config, task)
    if mesh.process_info.has_group:
        shard_experts(model, mesh, config.balance)
    init_weights(model, config.seed)
    return model


def model_cost(model: Model, sequence_length: int, decoder_length: int | None = None) -> Cost:
    """Count parameters and forward FLOPs per token of a model."""
    around = [model.embedding, model.head] + ([] if model.shared is None else [model.shared])
    cost = cost_of(model.backbone, around, sequence_length, decoder_length)
    if model.shared is None:
        return cost
    # It is run once more for its own loss, through a head of its own.
    own = count_flops(model.shared, sequence_length) + count_flops(model.shared.head, sequence_length)
    return replace(cost, training_only_flops=own)


def prepare_task(config: CellConfig, results: Path) -> Task:
    """Return the cell's task with its data ready, from the cache under the results folder where possible."""
    return TASKS.get(config.task.name).item.prepare(config.task, results / "cache")
