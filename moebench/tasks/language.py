"""What the tasks on text share, and `language`: next-token prediction, measured in bits per byte for any tokenizer."""

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
from typing_extensions import override

from moebench.errors import UsageError
from moebench.ranges import Range, at_least_1_up_to, check_ranges
from moebench.ranks import Span
from moebench.seeds import make_generator
from moebench.tasks.baselines.baseline import TrivialBaseline
from moebench.tasks.baselines.language import compute_language_baselines
from moebench.tasks.deferred_logits import DeferredLogits, ModelOutput, defer_logits
from moebench.tasks.task import ALL, TASKS, Batch, LabelKind, Task, TaskConfig, TaskFacts, average_by_domain
from moebench.tasks.text.kinds import TOKEN_KINDS
from moebench.tasks.text.prepared.reader import is_prepared, open_prepared, read_digest
from moebench.tasks.text.sources import TextDataConfig, source_digest
from moebench.tasks.text.windows import (
    PreparedText,
    TextSplit,
    evaluation_windows,
    prepare,
    select_windows,
    train_window_indices,
)


class TokenEmbedding(nn.Embedding):
    """A table of token vectors."""

    init_std: float = 1.0
    """Initial standard deviation: unit variance, which the first norm rescales anyway."""

    def init_weights(self, generator: Generator) -> None:
        """Draw normal vectors."""
        nn.init.normal_(self.weight, std=self.init_std, generator=generator)


class TokenHead(nn.Linear):
    """The projection to the vocabulary."""

    max_logits: int | None = None
    """Logits above which the output is `DeferredLogits`; None: never. Only a task that reads them sets it."""

    @override
    def forward(self, x_BLD: Tensor) -> ModelOutput:  # type: ignore[override]
        return defer_logits(x_BLD, self.weight, self.max_logits) or super().forward(x_BLD)

    def init_weights(self, generator: Generator) -> None:
        """Set the weights to zero: the first prediction is uniform, ln V nats per token."""
        nn.init.zeros_(self.weight)


Uniform = Callable[[int], Tensor]
"""n -> uniform draws [B, n] in [0, 1) (fp64) for the sequences of a batch, independent of how processes share it."""


@dataclass(frozen=True, kw_only=True)
class TextConfig(TaskConfig):
    """Options of every task on text; each task's own Config adds its name and its options."""

    NOT_IN_ID: ClassVar[tuple[str, ...]] = ("data.path", "data.made_by")
    NOT_IN_ID_IF_NULL: ClassVar[tuple[str, ...]] = ("train_windows",)
    RANGES: ClassVar[Mapping[str, Range]] = {
        "sequence_length": Range(low=2, limit=2**20),
        **dict.fromkeys(("eval_windows", "train_windows"), at_least_1_up_to(10**9)),
    }

    sequence_length: int = 64
    """Tokens per sequence."""
    eval_windows: int | None = 128
    """Sequences per domain in an evaluation, evenly spaced over the split; null: all."""
    train_windows: int | None = None
    """Number of sequences of the training split that are used, the same ones for every seed; a smaller number selects a
    part of what a larger one selects. null: all. If it is set, train.max_epochs=null sets no limit."""
    data: TextDataConfig = field(default_factory=TextDataConfig)
    """Source of the text."""

    def __post_init__(self) -> None:
        check_ranges(self, "task")


MAX_COUNTED_WINDOWS = 1024
"""Windows whose bytes are counted for a plan, evenly spaced over the training split."""
MAX_PAIR_VOCAB = 8192
"""Largest vocabulary whose pairs are counted, in a table of half a gigabyte."""


class TextTask(Task):
    """Data, splits by group (book, president, module, ...), windows, token embedding and loss of the tasks on text.

    Subclasses implement `make_batch`: inputs and targets of a window.
    """

    metric: ClassVar[str] = "bits_per_byte"
    sample_noun: ClassVar[str] = "windows"
    max_epochs: float = 4.0
    """Text that is repeated up to four times is worth almost as much as new text (arXiv:2305.16264, section 5)."""
    vocab_size: int
    token_count_V: Tensor

    def __init__(self, config: Any, text: PreparedText) -> None:
        self.config = config
        self.text = text
        self.domains = text.domains
        self.num_held_out = text.num_held_out
        self.digest = text.digest
        shape = (text.digest, config.sequence_length, config.eval_windows, self.metric, *self.eval_options(config))
        shape += ("mask_documents",) * config.data.mask_documents
        self.eval_digest = hashlib.sha256(repr(shape).encode()).hexdigest()[:12]
        self.sequence_length = config.sequence_length
        self.vocab_size = text.vocab_size
        self.token_count_V = torch.tensor(text.token_count_V)
        self.train_windows_W = select_windows(text.train.num_windows, config.train_windows)
        if self.train_windows_W is not None:
            self.max_epochs = math.inf  # a small training split is chosen to be repeated
            token_WM = text.train.window(self.train_windows_W)[0]
            self.token_count_V = torch.from_numpy(np.bincount(token_WM.ravel(), minlength=text.vocab_size))

    @staticmethod
    def eval_options(config: Any) -> tuple[object, ...]:
        """Return the options that change the evaluation set, besides those that every task on text has."""
        return ()

    @override
    @classmethod
    def source_digest(cls, config: Any) -> str:
        return read_digest(config.data) if is_prepared(config.data) else source_digest(config.data)

    @override
    @classmethod
    def prepare(cls, config: Any, cache: Path) -> "TextTask":
        open_text = open_prepared if is_prepared(config.data) else prepare
        return cls(config, open_text(config.data, cache, config.sequence_length))

    @override
    def token_pairs(self) -> Tensor:
        # Ids that a task adds to the vocabulary, such as a mask, have no neighbours in the text.
        if self.vocab_size > MAX_PAIR_VOCAB:
            raise UsageError(
                f"router.table: 'clustered' counts pairs of {self.vocab_size} ids (allowed: at most {MAX_PAIR_VOCAB})"
            )
        pairs_P, last_N = np.zeros(self.vocab_size**2, dtype=np.int64), np.empty(0, dtype=np.int64)
        if self.train_windows_W is not None:
            token_WM = self.text.train.window(self.train_windows_W)[0]
            pair_N = (token_WM[:, :-1] * self.vocab_size + token_WM[:, 1:]).ravel()
            pairs_P = np.bincount(pair_N, minlength=len(pairs_P))
            return torch.from_numpy(pairs_P.reshape(self.vocab_size, self.vocab_size))
        for chunk_N in self.text.train.tokens.chunks():
            token_N = np.concatenate([last_N, chunk_N])
            pairs_P += np.bincount(token_N[:-1] * self.vocab_size + token_N[1:], minlength=len(pairs_P))
            last_N = token_N[-1:]
        return torch.from_numpy(pairs_P.reshape(self.vocab_size, self.vocab_size))

    @override
    def label_kinds(self) -> tuple[LabelKind, ...]:
        kinds = self.text.kinds.pad_vocab(self.vocab_size)

        def read(batch: Batch) -> Tensor:
            return kinds.label(batch.input_BL, self.context_tokens(batch))

        return *super().label_kinds(), LabelKind(name="token", values=TOKEN_KINDS, read=read)

    def documents_of(self, token_BL: Tensor) -> Tensor | None:
        """Return the index of the document of each token in its window (int64); None if documents are not masked."""
        if not self.config.data.mask_documents:
            return None
        return (token_BL == self.text.separator).cumsum(1)

    def context_tokens(self, batch: Batch) -> Tensor:
        """Return the token at each position from which the starts of words are determined: by default the input."""
        return batch.input_BL

    @abstractmethod
    def make_batch(self, token_BM: Tensor, byte_BM: Tensor, domain_B: Tensor, uniform: Uniform) -> Batch:
        """Return the batch of windows of M = L + 1 tokens; `byte_BM`: UTF-8 bytes of each token."""

    @override
    def list_train_samples(self, batch_size: int, seed: int, step: int) -> list[int]:
        return [int(index) for index in self._choose_windows(batch_size, seed, step)]

    def _choose_windows(self, batch_size: int, seed: int, step: int) -> np.ndarray:
        """Return the windows of one training step (int64 [batch_size])."""
        window_B = train_window_indices(self.count_train_samples(), batch_size, seed, step, self.text.train.order)
        return window_B if self.train_windows_W is None else self.train_windows_W[window_B]

    def count_train_samples(self) -> int:
        """Return the number of windows that are trained on."""
        return self.text.train.num_windows if self.train_windows_W is None else len(self.train_windows_W)

    def estimate_sample_bytes(self) -> float:
        """Return the UTF-8 bytes that a window of the training split predicts, mean over some of them."""
        split = self.text.train
        window_W = np.linspace(0, split.num_windows - 1, min(split.num_windows, MAX_COUNTED_WINDOWS), dtype=np.int64)
        return float(split.window(window_W)[1][:, 1:].sum(1).mean())

    @override
    def train_batch(self, batch_size: int, seed: int, step: int, part: slice = ALL) -> Batch:
        split = self.text.train
        window_B = self._choose_windows(batch_size, seed, step)[part]
        return self._read_windows(split, window_B, uniform_draws(batch_size, self.config.name, seed, step, part=part))

    @override
    def eval_batches(self, split: str, batch_size: int) -> Sequence[Batch]:
        text: TextSplit = getattr(self.text, split)
        window_W = evaluation_windows(text, self.config.eval_windows)
        # Drawn for all windows at once, so that masks do not depend on the batch size.
        every = self._read_windows(text, window_W, uniform_draws(len(window_W), self.config.name, split))
        num_trained = int((text.domain_of(window_W) < self.num_trained_domains).sum())
        starts = [*range(0, num_trained, batch_size), *range(num_trained, len(window_W), batch_size)]
        ends = [*starts[1:], len(window_W)]
        spans = [Span(start=a, length=b - a, total=len(window_W)) for a, b in zip(starts, ends, strict=True)]
        return [replace(every.part(span), span=None) for span in spans]

    def _read_windows(self, split: TextSplit, window_B: np.ndarray, uniform: Uniform) -> Batch:
        token_BM, byte_BM = map(torch.from_numpy, split.window(window_B))
        return self.make_batch(token_BM, byte_BM, torch.from_numpy(split.domain_of(window_B)), uniform)

    @override
    def build_embedding(self, d_model: int) -> nn.Module:
        return TokenEmbedding(self.vocab_size, d_model)

    @override
    def build_head(self, d_model: int) -> nn.Module:
        return TokenHead(d_model, self.vocab_size, bias=False)

    @override
    def loss(self, output: ModelOutput, batch: Batch) -> Tensor:
        if isinstance(output, DeferredLogits):
            return output.compute_cross_entropy(batch.target_BP)
        logits_TV = output.flatten(0, 1).float()
        loss_T = functional.cross_entropy(logits_TV, batch.target_BP.reshape(-1), reduction="none")
        return loss_T.view_as(batch.target_BP)

    @override
    def log_probabilities(self, output: ModelOutput) -> Tensor:
        return super().log_probabilities(output.project() if isinstance(output, DeferredLogits) else output)

    @override
    def compute_quality(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        bits_D = sums["nats"] / math.log(2)
        return average_by_domain(self.metric, bits_D, sums["weight"], self.domains, self.num_held_out)


def uniform_draws(num_sequences: int, *purpose: object, part: slice = ALL) -> Uniform:
    """Return a function that draws for all `num_sequences` and returns `part`, so that processes draw as one would."""
    source = make_generator(*purpose)
    return lambda number: torch.rand(num_sequences, number, dtype=torch.float64, generator=source)[part]


@TASKS.register(
    TaskFacts(
        causal=True,
        metric="bits_per_byte",
        lower_is_better=True,
        data="7 domains of public-domain and freely licensed English and Python text, 13.7 MB; or 28 domains, 198 MB",
        output="tokens",
    )
)
class Language(TextTask):
    """Next-token prediction on text, split by group (book, president, module, ...), never by random windows."""

    @dataclass(frozen=True, kw_only=True)
    class Config(TextConfig):
        """Options of the language task."""

        name: str = "language"

    @override
    def make_batch(self, token_BM: Tensor, byte_BM: Tensor, domain_B: Tensor, uniform: Uniform) -> Batch:
        input_BL = token_BM[:, :-1]
        return Batch(
            input_BL=input_BL,
            target_BP=token_BM[:, 1:],
            weight_BP=byte_BM[:, 1:],
            domain_B=domain_B,
            document_BL=self.documents_of(input_BL),
        )

    @override
    def compute_baselines(self, split: str) -> Sequence[TrivialBaseline]:
        return compute_language_baselines(self, split)
