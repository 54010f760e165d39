"""The whole model of a cell: the task's embedding and head around the backbone."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from moebench.experts.knobs import make_adjustable
from moebench.models.build import NO_FEATURES, build_backbone
from moebench.models.cost import Cost, compute_cost, count_flops
from moebench.models.encoder_decoder import EncoderDecoder
from moebench.models.storageless import build_without_storage
from moebench.models.tied_head import TiedHead, tie
from moebench.models.transformer import BatchContext, Transformer, init_weights
from moebench.parallel.expert_sharding import shard_experts
from moebench.parallel.mesh import SINGLE_PROCESS_MESH, Mesh
from moebench.routing.context import DataSummary
from moebench.routing.features.feature import Feature, collect, count_passes, sequence_group_size
from moebench.routing.router import required_features
from moebench.routing.values import LayerRecord
from moebench.schema import CellConfig, ModelConfig, TrainConfig
from moebench.seeds import derive_seed
from moebench.tasks.contract import build_task
from moebench.tasks.deferred_logits import MAX_LOGITS, ModelOutput
from moebench.tasks.language import TextTask, TokenHead
from moebench.tasks.task import TASKS, Batch, Task
from moebench.training.optimizer.groups import describe_parameters
from moebench.training.optimizer.mup import (
    compute_width_factors,
    refuse_shared_embedding,
    scale_initial_weights,
    shrink_widths,
)
from moebench.training.precision import keep_routing_exact


class Model(nn.Module):
    """Embedding, backbone, head: a batch to outputs and the records of the MoE layers."""

    def __init__(
        self,
        embedding: nn.Module,
        backbone: Transformer | EncoderDecoder,
        head: nn.Module,
        features: Sequence[Feature] = (),
        feature_modules: Mapping[type[Feature], nn.Module] = NO_FEATURES,
        embedding_scale: float = 1.0,
    ) -> None:
        """`features`: those that the routers require. `feature_modules`: the modules of features that have one.

        `embedding_scale`: factor on embedded inputs.
        """
        super().__init__()
        self.embedding_scale = embedding_scale
        self.embedding = embedding
        self.backbone = backbone
        self.head = head
        self.features = tuple(features)
        self.new_experts: Mapping[str, Sequence[int]] = {}
        """Stack of experts -> experts that its parent lacks; empty without a parent."""
        for feature, module in feature_modules.items():
            self.add_module(feature.module_name, module)

    def forward(self, batch: Batch, ctx: BatchContext) -> tuple[ModelOutput, list[LayerRecord]]:
        """Return what the task's `loss` reads, and one record per MoE layer."""
        x_BLD, records = self.compute_hidden(batch, ctx)
        return self.head(x_BLD), records

    @property
    def sequence_group_size(self) -> int:
        """Number of consecutive sequences that must be on the same process."""
        return sequence_group_size(self.features)

    def feature_module(self, feature: Feature) -> nn.Module | None:
        """Return the module of a feature; None where it has none."""
        return self.get_submodule(feature.module_name) if feature.module_name else None

    def embed(self, input_BL: Tensor) -> Tensor:
        """Return the vectors that the backbone and the features read."""
        x_BLD: Tensor = self.embedding(input_BL)
        return x_BLD if self.embedding_scale == 1 else self.embedding_scale * x_BLD

    def compute_hidden(self, batch: Batch, ctx: BatchContext) -> tuple[Tensor, list[LayerRecord]]:
        """Return the vectors that the head reads, and the records."""
        x_BLD = self.embed(batch.input_BL)
        ctx = replace(ctx, features=self._feature_values(batch, x_BLD))
        hidden: tuple[Tensor, list[LayerRecord]]
        if isinstance(self.backbone, EncoderDecoder):
            decoder_batch = batch.decoder_batch
            y_BPD = self.embed(decoder_batch.input_BL)
            decoder_ctx = replace(
                ctx,
                token_id_BL=decoder_batch.input_BL,
                valid_BL=decoder_batch.valid_BL,
                features=self._feature_values(decoder_batch, y_BPD),
            )
            hidden = self.backbone(x_BLD, ctx, y_BPD, decoder_ctx)
        else:
            hidden = self.backbone(x_BLD, ctx)
        return hidden

    def _feature_values(self, batch: Batch, x_BLD: Tensor) -> dict[type[Feature], Tensor]:
        def read(feature: Feature) -> Tensor | None:
            value_BL = feature.from_batch(batch, x_BLD, self.feature_module(feature))
            return None if value_BL is None else value_BL.flatten(0, 1)

        return collect(self.features, read)


def build_model(config: CellConfig, task: Task, sized_as: CellConfig | None = None) -> Model:
    """Build the model of a cell; its weights are not drawn yet (see `init_weights`).

    `sized_as`: the cell whose experts' widths it has; None: its own.
    """
    facts = TASKS.get(config.task.name).facts
    features, data = required_features(config.router), summarise_data(task)
    values = collect(features, lambda feature: feature.from_task(task))
    build = partial(build_backbone, config, features=values, sized_as=sized_as)
    backbone: Transformer | EncoderDecoder
    if facts.is_encoder_decoder:
        backbone = EncoderDecoder(
            build(causal=False, data=data, half="encoder"),
            build(causal=True, data=replace(data, sequence_length=task.decoder_length), half="decoder"),
        )
    else:
        backbone = build(causal=facts.causal, data=data)
    d_model = config.model.d_model
    modules = collect(features, lambda feature: feature.build_module(d_model, task.build_head))
    embedding, head = task.build_embedding(d_model), task.build_head(d_model)
    head = tie(embedding, head) if config.model.tie_embeddings else head
    model = Model(embedding, backbone, head, features, modules, select_embedding_scale(config.model))
    _choose_computation(model, config.train, task)
    if config.layout.match == "measured_flops":
        make_adjustable(backbone.moe_layers())
    return model


def _choose_computation(model: Model, train: TrainConfig, task: Task) -> None:
    """Set how the modules of a model compute, which does not change what they compute."""
    reads_deferred_logits = type(task).loss is TextTask.loss  # a plugin's own loss may not
    for module in model.modules():
        if isinstance(module, TokenHead | TiedHead) and reads_deferred_logits:
            module.max_logits = MAX_LOGITS[train.cross_entropy]
        if isinstance(module, Transformer):
            module.recomputes_blocks = train.recompute == "blocks"
    if train.tf32:
        keep_routing_exact(model)


def select_embedding_scale(model: ModelConfig) -> float:
    """Return the factor on embedded inputs; by default tied ones have unit variance too when training starts."""
    if model.embedding_scale is not None:
        return model.embedding_scale
    return float(model.d_model**0.5) if model.tie_embeddings else 1.0


def summarise_data(task: Task) -> DataSummary:
    """Return the facts about a task's data that routers may use when they are built."""
    return DataSummary(
        vocab_size=task.vocab_size,
        token_count_V=task.token_count_V,
        sequence_length=task.sequence_length,
        num_domains=task.num_trained_domains,
        domains=tuple(task.domains),
    )


def build_initialised_model(config: CellConfig, task: Task, mesh: Mesh = SINGLE_PROCESS_MESH) -> Model:
    """Build the model, as one of the mesh's processes has it, and draw its weights from the cell's seed."""
    with torch.random.fork_rng(devices=[]):
        # Modules of plug-ins that draw when they are built, such as nn.Linear: by the seed, on each process alike.
        torch.default_generator.manual_seed(derive_seed(config.seed, "build"))
        model = build_model(config, task)
    if mesh.process_info.has_group:
        shard_experts(model, mesh, config.balance)
    init_weights(model, config.seed)
    base = build_base_model(config, task)
    if base is not None:
        refuse_shared_embedding(model.head, model.embedding)
        roles = describe_parameters(model)
        scale_initial_weights(roles, compute_width_factors(config, roles, base))
    return model


def build_base_model(config: CellConfig, task: Task) -> Model | None:
    """Return the shapes of the model whose learning rates a model uses, on the meta device; None without muP."""
    if config.train.mup_base_width is None:
        return None
    with build_without_storage():
        return build_model(shrink_widths(config), task)


def compute_model_cost(model: Model, sequence_length: int, decoder_length: int | None = None) -> Cost:
    """Count parameters and forward FLOPs per token of a model."""
    modules = collect(model.features, model.feature_module)
    cost = compute_cost(
        model.backbone, [model.embedding, model.head, *modules.values()], sequence_length, decoder_length
    )
    count = partial(count_flops, length=sequence_length)
    training_only = [feature.count_training_flops(model.feature_module(feature), count) for feature in model.features]
    return replace(cost, train_passes=count_passes(model.features), training_only_flops=sum(training_only))


def prepare_task(config: CellConfig, results: Path) -> Task:
    """Return the cell's task with its data ready, from the cache under the results folder where possible."""
    return build_task(config.task, results / "cache")
