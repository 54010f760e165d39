"""The costs of an experiment's models: each different one is built once, without storage, whatever the grid's size."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from moebench.compatibility import list_marks
from moebench.launch.devices import uses_gpu
from moebench.models.cost import Cost
from moebench.models.memory import (
    COPIES_IN_BF16_ON_CPU,
    COPIES_OF_A_VALUE,
    RECOMPUTED_WEIGHT_COPIES,
    SAVED_COPIES,
    ModelSize,
    StepMemory,
)
from moebench.models.storageless import build_without_storage
from moebench.routing.features.feature import count_passes
from moebench.schema import CellConfig
from moebench.tasks.task import Task
from moebench.training.backward_cost import TrainedPart, measure_trained_part
from moebench.training.batches import estimate_train_tokens
from moebench.training.model import build_model, compute_model_cost, prepare_task
from moebench.training.optimizer.muon import MAX_BATCH_ELEMENTS
from moebench.training.task_trial import try_task


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What is known of a model before it is trained."""

    cost: Cost
    size: ModelSize
    passes: int
    """Forward passes of a step of training."""
    marks: tuple[str, ...]
    """Warnings shown beside the arm."""
    shapes: Mapping[str, torch.Size]
    """Shapes of the weights, by name."""
    trained: TrainedPart
    """What the backward pass and the update cost."""


class ModelCosts:
    """Tasks, models and token counts of cells, kept by the settings that they depend on."""

    def __init__(self, results: Path) -> None:
        self.results = results
        self._tasks: dict[str, Task] = {}
        self._facts: dict[tuple[str, ...], ModelFacts] = {}
        self._tokens: dict[tuple[str, ...], int] = {}

    def task(self, config: CellConfig) -> Task:
        """Return the task of a cell; the first time, its data are prepared, and that of a plug-in is tried."""
        key = repr(config.task)
        if key not in self._tasks:
            task = prepare_task(config, self.results)
            try_task(config, task)
            self._tasks[key] = task
        return self._tasks[key]

    def facts(self, config: CellConfig) -> ModelFacts:
        """Return the facts of a cell's model."""
        sections = (config.task, config.model, config.layout, config.router)
        train = config.train
        computation = (train.precision, train.cross_entropy, train.recompute, train.trainable)
        key = (*map(repr, sections), *computation, str(config.allow_noncausal))
        if key not in self._facts:
            self._facts[key] = _measure(config, self.task(config))
        return self._facts[key]

    def train_tokens(self, config: CellConfig) -> int:
        """Return the number of tokens that a cell is trained on, without padding."""
        train = config.train
        key = (repr(config.task), str(train.batch_size), str(train.steps), str(config.seed))
        if key not in self._tokens:
            self._tokens[key] = estimate_train_tokens(config, self.task(config))
        return self._tokens[key]

    def training_flops(self, config: CellConfig) -> float:
        """Return the FLOPs of all training steps of a cell, forward and backward, as planned."""
        facts = self.facts(config)
        return facts.trained.factor * facts.cost.training_flops * self.train_tokens(config)

    def tokens_per_process(self, config: CellConfig) -> int:
        """Return the tokens of one micro-batch on one process: the last of the unequal parts may have fewer."""
        sequences = config.train.batch_size // config.train.accumulate
        return -(-sequences // config.parallel.world_size) * self.task(config).tokens_per_sequence

    def training_bytes(self, config: CellConfig) -> int:
        """Return the bytes that one process of a cell allocates at the peak of a training step."""
        facts = self.facts(config)
        is_bf16 = config.train.precision == "bf16"
        is_slow_bf16 = is_bf16 and not uses_gpu(config.train)
        step = StepMemory(
            shards=config.parallel.expert,
            passes=facts.passes,
            copies=COPIES_IN_BF16_ON_CPU if is_slow_bf16 else COPIES_OF_A_VALUE,
            keeps_gradients=config.train.accumulate > 1,
            trained_share=facts.trained.share,
            batched_update=MAX_BATCH_ELEMENTS if config.train.optimizer == "muon" else 0,
            weight_copies=RECOMPUTED_WEIGHT_COPIES if is_bf16 and config.train.recompute == "blocks" else 0.0,
            saved_copies=SAVED_COPIES if config.parallel.async_checkpoints else 0,
        )
        return facts.size.training_bytes(self.tokens_per_process(config), step)


def _measure(config: CellConfig, task: Task) -> ModelFacts:
    with build_without_storage():
        model = build_model(config, task)
    return ModelFacts(
        cost=compute_model_cost(model, task.sequence_length, task.decoder_length),
        size=ModelSize.of(model, model.backbone, task.sequence_length, task.decoder_length),
        passes=count_passes(model.features),
        marks=list_marks(config),
        trained=measure_trained_part(model, config.train, task.sequence_length),
        shapes={name: value.shape for name, value in model.state_dict().items()},
    )
