"""Causal language modelling: predict the next token; quality in bits per byte, whatever the tokenizer."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from moebench.errors import require
from moebench.tasks.task import ALL, TASKS, Batch, Task, TaskFacts, by_domain
from moebench.tasks.text.documents import TextDataConfig, source_digest
from moebench.tasks.text.windows import (
    PreparedText,
    TextSplit,
    evaluation_windows,
    prepare,
    train_window_indices,
)


class TokenEmbedding(nn.Embedding):
    """A table of token vectors."""

    def init_weights(self, generator: Generator) -> None:
        """Draw unit-variance vectors: the first norm brings any scale to 1 anyway."""
        nn.init.normal_(self.weight, generator=generator)


class TokenHead(nn.Linear):
    """The projection to the vocabulary."""

    def init_weights(self, generator: Generator) -> None:
        """Start at zero: the first prediction is uniform, ln V nats per token."""
        nn.init.zeros_(self.weight)


@TASKS.register(
    TaskFacts(
        causal=True,
        metric="bits_per_byte",
        lower_is_better=True,
        data="7 domains of public-domain and freely licensed English and Python text, 13.7 MB",
    )
)
class Language(Task):
    """Next-token prediction on text; splits by group (book, president, module ...), never by random windows."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of the language task."""

        NOT_IN_ID: ClassVar[tuple[str, ...]] = ("data.path",)

        name: str = "language"
        sequence_length: int = 64
        """Tokens per sequence."""
        eval_windows: int | None = 128
        """Sequences of each domain in an evaluation, evenly spaced over the split; null takes all."""
        data: TextDataConfig = field(default_factory=TextDataConfig)
        """Where the text comes from."""

        def __post_init__(self) -> None:
            """Refuse values out of range."""
            require(self.sequence_length >= 2, "task.sequence_length", self.sequence_length, "at least 2")
            require(
                self.eval_windows is None or self.eval_windows >= 1,
                "task.eval_windows",
                self.eval_windows,
                "at least 1, or null for all",
            )

    def __init__(self, config: Config, text: PreparedText) -> None:
        self.config = config
        self.text = text
        self.domains = text.domains
        self.digest = text.digest
        shape = (text.digest, config.sequence_length, config.eval_windows, "bits_per_byte")
        self.eval_digest = hashlib.sha256(repr(shape).encode()).hexdigest()[:12]
        self.sequence_length = config.sequence_length
        self.vocab_size = text.vocab_size
        self.token_count_V = torch.tensor(text.token_count_V)

    @classmethod
    def source_digest(cls, config: Any) -> str:
        """Digest the text source and the tokenizer."""
        return source_digest(config.data)

    @classmethod
    def prepare(cls, config: Any, cache: Path) -> "Language":
        """Split and encode the text, or take it from the cache."""
        return cls(config, prepare(config.data, cache, config.sequence_length))

    def train_batch(self, batch_size: int, seed: int, step: int, part: slice = ALL) -> Batch:
        """Take the windows of this step in the epoch's shuffled order."""
        split = self.text.train
        return self._batch(split, train_window_indices(split.num_windows, batch_size, seed, step)[part])

    def eval_batches(self, split: str, batch_size: int) -> Sequence[Batch]:
        """Take evenly spaced windows, the same number of each domain."""
        part: TextSplit = getattr(self.text, split)
        chosen = evaluation_windows(part, self.config.eval_windows)
        return [self._batch(part, chosen[i : i + batch_size]) for i in range(0, len(chosen), batch_size)]

    def _batch(self, split: TextSplit, window_B: np.ndarray) -> Batch:
        token_BM, byte_BM = split.window(window_B)
        return Batch(
            input_BL=torch.from_numpy(token_BM[:, :-1].copy()),
            target_BP=torch.from_numpy(token_BM[:, 1:].copy()),
            weight_BP=torch.from_numpy(byte_BM[:, 1:].copy()),
            domain_B=torch.from_numpy(split.domain_W[window_B].astype(np.int64)),
        )

    def embedding(self, d_model: int) -> nn.Module:
        """Return a token table."""
        assert self.vocab_size is not None
        return TokenEmbedding(self.vocab_size, d_model)

    def head(self, d_model: int) -> nn.Module:
        """Return the projection to the vocabulary."""
        assert self.vocab_size is not None
        return TokenHead(d_model, self.vocab_size, bias=False)

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the cross-entropy of each position in nats, in fp32."""
        logits_TV = output.flatten(0, 1).float()
        loss_T = functional.cross_entropy(logits_TV, batch.target_BP.reshape(-1), reduction="none")
        return loss_T.view_as(batch.target_BP)

    def quality(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Return bits per byte over all domains and for each: summed code length over summed bytes."""
        return by_domain("bits_per_byte", sums["nats"] / math.log(2), sums["weight"], self.domains)
