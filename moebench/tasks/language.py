"""Tasks on text, and the first of them: predict the next token; quality in bits per byte, whatever the tokenizer."""

import hashlib
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from moebench.errors import UsageError, require
from moebench.ranks import Span
from moebench.seeds import make_generator
from moebench.tasks.task import ALL, TASKS, Batch, LabelKind, Task, TaskFacts, average_by_domain
from moebench.tasks.text.documents import TextDataConfig, source_digest
from moebench.tasks.text.kinds import TOKEN_KINDS
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


Uniform = Callable[[int], Tensor]
"""n -> [B, n] draws in [0, 1), fp64: those of some sequences, whichever process asks."""


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Options of every task on text; each task's own Config adds its name and its options."""

    NOT_IN_ID: ClassVar[tuple[str, ...]] = ("data.path", "data.made_by")

    name: str
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


MOST_PAIRED = 8192
"""Ids whose pairs are counted in one table: half a gigabyte."""


class TextTask(Task):
    """What tasks on text share: data, splits by group (book, president, module ...), windows, token table and loss.

    A task of its own says what a model reads and what it should say (`make`).
    """

    metric: ClassVar[str] = "bits_per_byte"
    vocab_size: int
    token_count_V: Tensor

    def __init__(self, config: Any, text: PreparedText) -> None:
        self.config = config
        self.text = text
        self.domains = text.domains
        self.num_held_out = text.num_held_out
        self.digest = text.digest
        shape = (text.digest, config.sequence_length, config.eval_windows, self.metric, *self.decides(config))
        self.eval_digest = hashlib.sha256(repr(shape).encode()).hexdigest()[:12]
        self.sequence_length = config.sequence_length
        self.vocab_size = text.vocab_size
        self.token_count_V = torch.tensor(text.token_count_V)

    @staticmethod
    def decides(config: Any) -> tuple[object, ...]:
        """Return the options that change the evaluation set, besides those that every text task has."""
        return ()

    @classmethod
    def source_digest(cls, config: Any) -> str:
        """Digest the text source and the tokenizer."""
        return source_digest(config.data)

    @classmethod
    def prepare(cls, config: Any, cache: Path) -> "TextTask":
        """Split and encode the text, or take it from the cache."""
        return cls(config, prepare(config.data, cache, config.sequence_length))

    def token_pairs(self) -> Tensor:
        """Count in the training text; ids that stand for nothing in it, such as a mask, have no neighbours."""
        if self.vocab_size > MOST_PAIRED:
            raise UsageError(
                f"router.table: 'clustered' counts pairs of {self.vocab_size} ids (allowed: at most {MOST_PAIRED})"
            )
        token_N = np.asarray(self.text.train.tokens_N, dtype=np.int64)
        pair_N = token_N[:-1] * self.vocab_size + token_N[1:]
        pairs_VV = np.bincount(pair_N, minlength=self.vocab_size**2).reshape(self.vocab_size, self.vocab_size)
        return torch.from_numpy(pairs_VV)

    def label_kinds(self) -> tuple[LabelKind, ...]:
        """Add the kind of token: the start of a word, a digit, and so on."""
        kinds = self.text.kinds.extended(self.vocab_size)

        def read(batch: Batch) -> Tensor:
            return kinds.label(batch.input_BL, self.text_of(batch))

        return *super().label_kinds(), LabelKind(name="token", values=TOKEN_KINDS, read=read)

    def text_of(self, batch: Batch) -> Tensor:
        """Return the tokens that say where words begin, one for each that is read: those themselves."""
        return batch.input_BL

    @abstractmethod
    def make(self, token_BM: Tensor, byte_BM: Tensor, domain_B: Tensor, uniform: Uniform) -> Batch:
        """Return the batch of some windows: L + 1 tokens each, the bytes of each token, and their domain."""

    def train_batch(self, batch_size: int, seed: int, step: int, part: slice = ALL) -> Batch:
        """Take the windows of this step in the epoch's shuffled order; what is drawn is drawn for all of them."""
        split = self.text.train
        window_B = train_window_indices(split.num_windows, batch_size, seed, step)[part]
        return self._of_windows(split, window_B, uniform_draws(batch_size, self.config.name, seed, step, part=part))

    def eval_batches(self, split: str, batch_size: int) -> Sequence[Batch]:
        """Take evenly spaced windows, the same number of each domain; what is drawn does not depend on the batch.

        Domains that were held out of training come last, in batches of their own.
        """
        part: TextSplit = getattr(self.text, split)
        chosen = evaluation_windows(part, self.config.eval_windows)
        whole = self._of_windows(part, chosen, uniform_draws(len(chosen), self.config.name, split))
        first = int((part.domain_W[chosen] < self.num_trained_domains).sum())
        starts = [*range(0, first, batch_size), *range(first, len(chosen), batch_size)]
        ends = [*starts[1:], len(chosen)]
        spans = [Span(start=a, length=b - a, total=len(chosen)) for a, b in zip(starts, ends, strict=True)]
        return [replace(whole.part(span), span=None) for span in spans]

    def _of_windows(self, split: TextSplit, window_B: np.ndarray, uniform: Uniform) -> Batch:
        token_BM, byte_BM = map(torch.from_numpy, split.window(window_B))
        return self.make(token_BM, byte_BM, torch.from_numpy(split.domain_W[window_B].astype(np.int64)), uniform)

    def build_embedding(self, d_model: int) -> nn.Module:
        """Return a token table."""
        return TokenEmbedding(self.vocab_size, d_model)

    def build_head(self, d_model: int) -> nn.Module:
        """Return the projection to the vocabulary."""
        return TokenHead(d_model, self.vocab_size, bias=False)

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the cross-entropy of each position in nats, in fp32."""
        logits_TV = output.flatten(0, 1).float()
        loss_T = functional.cross_entropy(logits_TV, batch.target_BP.reshape(-1), reduction="none")
        return loss_T.view_as(batch.target_BP)

    def compute_quality(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Return bits per byte over the domains of training, out of domain and for each: code length over bytes."""
        return average_by_domain(
            self.metric, sums["nats"] / math.log(2), sums["weight"], self.domains, self.num_held_out
        )


def uniform_draws(num_sequences: int, *purpose: object, part: slice = ALL) -> Uniform:
    """Return what draws for `num_sequences` and keeps a part: a process draws what one process would."""
    source = make_generator(*purpose)
    return lambda number: torch.rand(num_sequences, number, dtype=torch.float64, generator=source)[part]


@TASKS.register(
    TaskFacts(
        causal=True,
        metric="bits_per_byte",
        lower_is_better=True,
        data="7 domains of public-domain and freely licensed English and Python text, 13.7 MB",
    )
)
class Language(TextTask):
    """Next-token prediction on text; splits by group (book, president, module ...), never by random windows."""

    @dataclass(frozen=True, kw_only=True)
    class Config(TextConfig):
        """Options of the language task."""

        name: str = "language"

    def make(self, token_BM: Tensor, byte_BM: Tensor, domain_B: Tensor, uniform: Uniform) -> Batch:
        """Let each token predict the next one."""
        return Batch(input_BL=token_BM[:, :-1], target_BP=token_BM[:, 1:], weight_BP=byte_BM[:, 1:], domain_B=domain_B)
