"""Base class of the tasks on audio: options, batches, features and evaluation sets."""

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Generator, Tensor, nn
from typing_extensions import override

from moebench.ranges import AT_LEAST_0, AT_LEAST_1, Range, check_ranges
from moebench.tasks.audio.batches import (
    Masking,
    draw_masks,
    evaluation_indices,
    pad_frames,
    pad_symbols,
    stack_frames,
    train_indices,
)
from moebench.tasks.audio.clips import AudioDataConfig, Target, source_digest
from moebench.tasks.audio.utterances import PreparedAudio, Utterances, prepare
from moebench.tasks.language import TokenHead
from moebench.tasks.task import ALL, Batch, Task, TaskConfig


@dataclass(frozen=True, kw_only=True)
class AudioConfig(TaskConfig):
    """Options of every task on audio; each task's own Config adds its name and its options."""

    RANGES: ClassVar[Mapping[str, Range]] = {
        **dict.fromkeys(("context", "band_masks", "band_mask_mels", "time_masks", "time_mask_frames"), AT_LEAST_0),
        "stack": Range(low=1, high=16),
        "eval_utterances": AT_LEAST_1,
    }
    NOT_IN_ID: ClassVar[tuple[str, ...]] = ("data.path",)

    stack: int = 4
    """Number of consecutive frames of 10 ms in one position."""
    context: int = 4
    """Number of frames before and after those of a position that are added to its input."""
    band_masks: int = 1
    """Number of frequency masks per utterance in training."""
    band_mask_mels: int = 8
    """Maximum width of a frequency mask, in mel bands."""
    time_masks: int = 1
    """Number of time masks per utterance in training."""
    time_mask_frames: int = 20
    """Maximum width of a time mask, in frames; never more than a fifth of the utterance."""
    eval_utterances: int | None = None
    """Utterances per domain in an evaluation, evenly spaced over the split; null: all."""
    data: AudioDataConfig = field(default_factory=AudioDataConfig)
    """Source of the recordings."""

    def __post_init__(self) -> None:
        check_ranges(self, "task")

    @property
    def masking(self) -> Masking:
        """The masks of training batches."""
        return Masking(
            num_band_masks=self.band_masks,
            max_bands=self.band_mask_mels,
            num_time_masks=self.time_masks,
            max_frames=self.time_mask_frames,
        )


class FrameEmbedding(nn.Linear):
    """The projection of the frames of a position."""

    def init_weights(self, generator: Generator) -> None:
        """Draw normal weights with variance 1 / fan-in."""
        nn.init.normal_(self.weight, std=self.in_features**-0.5, generator=generator)


class AudioTask(Task):
    """A task that reads recordings; subclasses define classes, targets and loss."""

    target: ClassVar[Target]

    def __init__(self, config: AudioConfig, audio: PreparedAudio) -> None:
        self.config = config
        self.audio = audio
        self.domains = audio.domains
        self.num_held_out = audio.num_held_out
        self.digest = audio.digest
        shape = (audio.eval_digest, config.eval_utterances, self.target)
        self.eval_digest = hashlib.sha256(repr(shape).encode()).hexdigest()[:12]
        self.sequence_length = max(1, round(self._lengths(audio.train).mean()))

    @override
    @classmethod
    def source_digest(cls, config: Any) -> str:
        return source_digest(config.data, cls.target)

    @override
    @classmethod
    def prepare(cls, config: Any, cache: Path) -> "AudioTask":
        return cls(config, prepare(config.data, cache, cls.target))

    @override
    def count_positions(self, batch_size: int, seed: int, step: int) -> int:
        train = self.audio.train
        return int(self._lengths(train)[train_indices(train, batch_size, seed, step)].sum())

    @override
    def list_train_samples(self, batch_size: int, seed: int, step: int) -> list[int]:
        return [int(index) for index in train_indices(self.audio.train, batch_size, seed, step)]

    def count_train_samples(self) -> int:
        """Return the number of recordings of the training split."""
        return len(self.audio.train.domain_U)

    @override
    def train_batch(self, batch_size: int, seed: int, step: int, part: slice = ALL) -> Batch:
        index_B = train_indices(self.audio.train, batch_size, seed, step)
        return self._batch(self.audio.train, index_B, part, mask_seed=(seed, step))

    @override
    def eval_batches(self, split: str, batch_size: int) -> Sequence[Batch]:
        utterances: Utterances = getattr(self.audio, split)
        index_U = evaluation_indices(utterances, self.config.eval_utterances)
        is_trained_U = utterances.domain_U[index_U] < self.num_trained_domains
        return [
            self._batch(utterances, member_U[i : i + batch_size])
            for member_U in (index_U[is_trained_U], index_U[~is_trained_U])
            for i in range(0, len(member_U), batch_size)
        ]

    def _lengths(self, utterances: Utterances) -> np.ndarray:
        return -(-utterances.num_frames_U // self.config.stack)

    def _batch(
        self, utterances: Utterances, index_B: np.ndarray, part: slice = ALL, mask_seed: tuple[int, int] | None = None
    ) -> Batch:
        """Return the utterances `part`, padded to the longest one of the whole batch, as in every other process.

        They are masked if there is a `mask_seed`.
        """
        length_B = self._lengths(utterances)[index_B]
        length = int(length_B.max())
        frames_BNM = pad_frames(utterances, index_B[part], length * self.config.stack)
        if mask_seed is not None and self.config.masking.is_active:
            num_frames, num_mels = frames_BNM.shape[1:]
            num_frames_B = utterances.num_frames_U[index_B]
            masked_BNM = draw_masks(num_frames_B, num_frames, num_mels, self.config.masking, mask_seed)
            frames_BNM[masked_BNM[part]] = 0
        symbol_BS = torch.from_numpy(pad_symbols(utterances, index_B)[part])
        length_B = torch.from_numpy(length_B[part])
        target_BP, weight_BP, count_BP = self._targets(symbol_BS, length_B)
        return Batch(
            input_BL=stack_frames(torch.from_numpy(frames_BNM).float(), self.config.stack, self.config.context),
            target_BP=target_BP,
            weight_BP=weight_BP,
            domain_B=torch.from_numpy(utterances.domain_U[index_B[part]]),
            valid_BL=torch.arange(length) < length_B[:, None],
            count_BP=count_BP,
        )

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Number of outputs of the head."""

    @abstractmethod
    def _targets(self, symbol_BS: Tensor, length_B: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return target_BP, weight_BP and count_BP of utterances of `length_B` positions."""

    @override
    def build_embedding(self, d_model: int) -> nn.Module:
        width = (self.config.stack + 2 * self.config.context) * self.config.data.num_mels
        return FrameEmbedding(width, d_model, bias=False)

    @override
    def build_head(self, d_model: int) -> nn.Module:
        return TokenHead(d_model, self.num_classes, bias=False)
