"""Keyword recognition: which of a set of classes a recording is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from moebench.tasks.audio.batches import evaluation_indices
from moebench.tasks.audio.clips import AudioDataConfig
from moebench.tasks.audio.task import AudioConfig, AudioTask
from moebench.tasks.baselines.baseline import TrivialBaseline
from moebench.tasks.baselines.classification import (
    NUM_PARTS,
    ClassBaselines,
    ClassificationData,
    average_parts,
    limit_samples,
)
from moebench.tasks.baselines.measure import EVAL_BATCH
from moebench.tasks.task import TASKS, Batch, LabelKind, TaskFacts, average_by_domain


@TASKS.register(
    TaskFacts(
        causal=False,
        metric="accuracy",
        lower_is_better=False,
        data="no default: labelled recordings given by task.data.path or task.data.dataset",
    )
)
class Keyword(AudioTask):
    """Classify recordings: the logits are the mean of the head over the positions of a recording."""

    target = "label"

    @dataclass(frozen=True, kw_only=True)
    class Config(AudioConfig):
        """Options of the keyword task."""

        name: str = "keyword"
        data: AudioDataConfig = field(default_factory=lambda: AudioDataConfig(target_column="label"))
        """Source of the recordings: a table with a column of classes, or a folder with one subfolder per class."""

    @override
    @property
    def num_classes(self) -> int:
        return len(self.audio.symbols)

    @override
    def label_kinds(self) -> tuple[LabelKind, ...]:
        class_kind = LabelKind(name="class", values=self.audio.symbols, read=lambda batch: batch.target_BP)
        return *super().label_kinds(), class_kind

    @override
    def _targets(self, symbol_BS: Tensor, length_B: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return symbol_BS - 1, torch.ones_like(symbol_BS), None

    def _logits(self, output: Tensor, batch: Batch) -> Tensor:
        assert batch.valid_BL is not None
        valid_BL1 = batch.valid_BL.unsqueeze(-1)
        return output.float().where(valid_BL1, 0.0).sum(1) / valid_BL1.sum(1)

    @override
    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        loss_B = functional.cross_entropy(self._logits(output, batch), batch.target_BP[:, 0], reduction="none")
        return loss_B.unsqueeze(1)

    @override
    def compute_sums(self, output: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        correct_B = self._logits(output, batch).argmax(-1) == batch.target_BP[:, 0]
        return {**super().compute_sums(output, batch), "correct": correct_B}

    @override
    def compute_quality(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        return {
            **average_by_domain("accuracy", sums["correct"], sums["weight"], self.domains, self.num_held_out),
            **average_by_domain("nats", sums["nats"], sums["weight"], self.domains, self.num_held_out),
        }

    @override
    def compute_baselines(self, split: str) -> Sequence[TrivialBaseline]:
        return self._class_baselines.evaluate(split)

    @cached_property
    def _class_baselines(self) -> ClassBaselines:
        train = self.audio.train
        num_features = NUM_PARTS * self._batch(train, np.zeros(1, np.int64)).input_BL.shape[-1]
        index_N = evaluation_indices(train, None)
        number = limit_samples(len(index_N), num_features)
        index_N = index_N[np.arange(number) * len(index_N) // number]
        problem = ClassificationData(
            task=self,
            num_classes=self.num_classes,
            batches=(self._batch(train, index_N[i : i + EVAL_BATCH]) for i in range(0, number, EVAL_BATCH)),
            num_used=number,
            read_features=average_parts,
            spread_logits=lambda logits_BK, batch: logits_BK[:, None].expand(-1, batch.input_BL.shape[1], -1),
            feature_name=f"the mean features of {NUM_PARTS} equal parts",
        )
        return ClassBaselines(problem)
