"""What the tasks on audio have in common: options, batches, features, evaluation sets."""

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Generator, Tensor, nn

from moebench.errors import require
from moebench.tasks.audio.batches import (
    Masking,
    evaluation_indices,
    hidden,
    joined,
    padded_frames,
    padded_symbols,
    train_indices,
)
from moebench.tasks.audio.clips import AudioDataConfig, Target, source_digest
from moebench.tasks.audio.utterances import PreparedAudio, Utterances, prepare
from moebench.tasks.language import TokenHead
from moebench.tasks.task import ALL, Batch, Task


@dataclass(frozen=True, kw_only=True)
class AudioConfig:
    """What the tasks on audio have in common."""

    NOT_IN_ID: ClassVar[tuple[str, ...]] = ("data.path",)

    stack: int = 4
    """Frames of 10 ms that are joined to one position."""
    context: int = 4
    """Frames before and behind those that a position sees as well; 0 for none."""
    band_masks: int = 1
    """Stretches of mel bands hidden in each utterance of a training batch; 0 for none."""
    band_mask_mels: int = 8
    """Bands of such a stretch, at most."""
    time_masks: int = 1
    """Stretches of time hidden in each utterance of a training batch; 0 for none."""
    time_mask_frames: int = 20
    """Frames of such a stretch, at most; never more than a fifth of the utterance."""
    eval_utterances: int | None = None
    """Utterances of each domain in an evaluation, evenly spaced over the split; null takes all."""
    data: AudioDataConfig = field(default_factory=AudioDataConfig)
    """Where the recordings come from."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        require(1 <= self.stack <= 16, "task.stack", self.stack, "1 to 16")
        for name in ("context", "band_masks", "band_mask_mels", "time_masks", "time_mask_frames"):
            require(getattr(self, name) >= 0, f"task.{name}", getattr(self, name), "at least 0")
        given = self.eval_utterances
        require(given is None or given >= 1, "task.eval_utterances", given, "at least 1, or null for all")

    @property
    def masking(self) -> Masking:
        """What training hides."""
        return Masking(
            num_bands=self.band_masks,
            mels=self.band_mask_mels,
            num_times=self.time_masks,
            frames=self.time_mask_frames,
        )


class FrameEmbedding(nn.Linear):
    """The projection of the joined frames of a position."""

    def init_weights(self, generator: Generator) -> None:
        """Draw normal weights with variance 1 / fan-in."""
        nn.init.normal_(self.weight, std=self.in_features**-0.5, generator=generator)


class AudioTask(Task):
    """Recordings in, something said about each out: batches, features and evaluation sets of both tasks."""

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

    @classmethod
    def source_digest(cls, config: Any) -> str:
        """Digest the audio source and what becomes of it."""
        return source_digest(config.data, cls.target)

    @classmethod
    def prepare(cls, config: Any, cache: Path) -> "AudioTask":
        """Decode and split the recordings, or take them from the cache."""
        return cls(config, prepare(config.data, cache, cls.target))

    def count_positions(self, batch_size: int, seed: int, step: int) -> int:
        """Count the positions of a step's batch without its padding."""
        train = self.audio.train
        return int(self._lengths(train)[train_indices(train, batch_size, seed, step)].sum())

    def train_batch(self, batch_size: int, seed: int, step: int, part: slice = ALL) -> Batch:
        """Take the utterances of this step in the epoch's order, with stretches hidden."""
        index_B = train_indices(self.audio.train, batch_size, seed, step)
        return self._batch(self.audio.train, index_B, part, seed=(seed, step))

    def eval_batches(self, split: str, batch_size: int) -> Sequence[Batch]:
        """Take all utterances of a split or evenly spaced ones, those of similar length together.

        Domains that were held out of training come last, in batches of their own.
        """
        part: Utterances = getattr(self.audio, split)
        chosen = evaluation_indices(part, self.config.eval_utterances)
        is_trained = part.domain_U[chosen] < self.num_trained_domains
        return [
            self._batch(part, kind[i : i + batch_size])
            for kind in (chosen[is_trained], chosen[~is_trained])
            for i in range(0, len(kind), batch_size)
        ]

    def _lengths(self, utterances: Utterances) -> np.ndarray:
        return -(-utterances.num_frames_U // self.config.stack)

    def _batch(
        self, utterances: Utterances, index_B: np.ndarray, part: slice = ALL, seed: tuple[int, int] | None = None
    ) -> Batch:
        """Return the utterances of a part, padded to the longest of the whole batch: the same in every process."""
        length_B = self._lengths(utterances)[index_B]
        length = int(length_B.max())
        frames_BNM = padded_frames(utterances, index_B[part], length * self.config.stack)
        if seed is not None and self.config.masking.hides:
            num_frames, num_mels = frames_BNM.shape[1:]
            num_frames_B = utterances.num_frames_U[index_B]
            hidden_BNM = hidden(num_frames_B, num_frames, num_mels, self.config.masking, seed)
            frames_BNM[hidden_BNM[part]] = 0
        symbol_BS = torch.from_numpy(padded_symbols(utterances, index_B)[part])
        length_B = torch.from_numpy(length_B[part])
        target_BP, weight_BP, count_BP = self._targets(symbol_BS, length_B)
        return Batch(
            input_BL=joined(torch.from_numpy(frames_BNM).float(), self.config.stack, self.config.context),
            target_BP=target_BP,
            weight_BP=weight_BP,
            domain_B=torch.from_numpy(utterances.domain_U[index_B[part]]),
            valid_BL=torch.arange(length) < length_B[:, None],
            count_BP=count_BP,
        )

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Outputs of the head."""

    @abstractmethod
    def _targets(self, symbol_BS: Tensor, length_B: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return target_BP, weight_BP and count_BP of utterances of `length_B` positions."""

    def build_embedding(self, d_model: int) -> nn.Module:
        """Return the projection of joined frames."""
        width = (self.config.stack + 2 * self.config.context) * self.config.data.num_mels
        return FrameEmbedding(width, d_model, bias=False)

    def build_head(self, d_model: int) -> nn.Module:
        """Return the projection to the classes, at each position."""
        return TokenHead(d_model, self.num_classes, bias=False)
