"""The contract of a task: data, input embedding, head, loss and metrics. A task is independent of routing."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from moebench.components import TaskConfig as TaskConfig
from moebench.errors import UsageError
from moebench.ranks import Span
from moebench.registry import Registry
from moebench.tasks.baselines.baseline import TrivialBaseline
from moebench.tasks.domain_metrics import OUT_OF_DOMAIN as OUT_OF_DOMAIN
from moebench.tasks.domain_metrics import average_by_domain as average_by_domain
from moebench.tasks.domain_metrics import metric_names as metric_names

ALL = slice(None)
"""Selects every sequence of a batch."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """One batch on one device: B sequences of L positions, with P predictions each.

    `input_BL`, `label_BL` and `valid_BL` of an encoder-decoder model are the encoder's; see `decoder_batch`.
    """

    input_BL: Tensor
    """Input of the embedding: token ids [B, L] (int64), or vectors, patches or frames [B, L, width] of any type."""
    target_BP: Tensor
    """Targets: token ids of each position (P = L), a class of the whole sequence (P = 1), vectors [B, P, width], or the
    symbols [B, S] of a transcript, whose loss is one number (P = 1)."""
    weight_BP: Tensor
    """Size of each prediction in units of the metric: bytes of text, for example."""
    domain_B: Tensor
    """Index (int64) into the domains of the task."""
    label_BL: Tensor | None = None
    """Label (int64) of each position, where the data determine which positions belong to one expert."""
    valid_BL: Tensor | None = None
    """False at padding (bool); None: no padding. Padding takes part in neither routing nor attention."""
    document_BL: Tensor | None = None
    """Index (int64) of the document that each position is of: attention stays inside it. None: it covers all."""
    decoder_input_BP: Tensor | None = None
    """Input of the decoder of an encoder-decoder model: token ids (int64)."""
    decoder_valid_BP: Tensor | None = None
    """Like `valid_BL`, for the positions of the decoder."""
    count_BP: Tensor | None = None
    """Weight (int64) of each prediction in the denominator of the mean loss: 0 where nothing is predicted, the number
    of symbols where one loss covers a transcript; None: all 1."""
    span: Span | None = None
    """Sequences of the batch of all processes that are in this part; None: all."""
    is_pinned: bool = False
    """Whether the tensors are in pinned memory of the host (`pin_memory`)."""
    count_in_step: Tensor | None = None
    """Sum of `count_BP` over the local micro-batches of the step (int64); None where `count_BP` is None."""

    @property
    def token_id_BL(self) -> Tensor | None:
        """Token ids, which some routers read; None where the input is not made of tokens."""
        return self.input_BL if self.input_BL.dtype == torch.int64 and self.input_BL.dim() == 2 else None

    @property
    def num_predictions(self) -> int:
        """Number of predictions P per sequence."""
        return self.weight_BP.shape[1]

    @property
    def decoder_batch(self) -> "Batch":
        """The batch as the decoder sees it: `input_BL` and `valid_BL` are those of its positions."""
        assert self.decoder_input_BP is not None
        batch = replace(self, input_BL=self.decoder_input_BP, valid_BL=self.decoder_valid_BP, label_BL=None)
        return replace(batch, decoder_input_BP=None, decoder_valid_BP=None)

    def to(self, device: Any) -> "Batch":
        """Return the batch with its tensors on another device; the copy of a pinned batch is not waited for."""
        moved = self._map_tensors(lambda tensor: tensor.to(device, non_blocking=self.is_pinned))
        return replace(moved, is_pinned=False)

    def pin_memory(self) -> "Batch":
        """Return the batch in memory from which a GPU copies by itself."""
        return replace(self._map_tensors(lambda tensor: tensor.pin_memory()), is_pinned=True)

    def part(self, span: Span) -> "Batch":
        """Return the sequences of one process, which `span` selects."""
        return replace(self._map_tensors(lambda tensor: tensor[span.as_slice] if tensor.dim() else tensor), span=span)

    def _map_tensors(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        mapped: Any = {name: function(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **mapped)


NUM_PARTS = 8
"""Parts of a sequence that the label kind `position` distinguishes."""


@dataclass(frozen=True, kw_only=True)
class LabelKind:
    """A kind of label that every position has; evaluations measure how much information experts have about it."""

    name: str
    """Suffix of the metric load/information/NAME."""
    values: tuple[str, ...]
    """Names of the labels 0, 1, ..."""
    read: Callable[[Batch], Tensor]
    """Returns the label (int64) of each position of a batch, in a shape that broadcasts to [B, L]; any value at
    padding. For an encoder-decoder model it is called for each half (`Batch.decoder_batch`)."""


def domain_label_kind(domains: Sequence[str]) -> LabelKind:
    """Return the label kind whose labels are the domains of sequences."""
    return LabelKind(name="domain", values=tuple(domains), read=lambda batch: batch.domain_B.unsqueeze(1))


def position_label_kind() -> LabelKind:
    """Return the label kind whose labels are the `NUM_PARTS` equal parts of a sequence."""
    names = tuple(f"{part + 1}/{NUM_PARTS}" for part in range(NUM_PARTS))
    return LabelKind(name="position", values=names, read=_part_BL)


def _part_BL(batch: Batch) -> Tensor:
    length = batch.input_BL.shape[1]
    position_1L = torch.arange(length, device=batch.input_BL.device).unsqueeze(0)
    if batch.valid_BL is None:
        return position_1L * NUM_PARTS // max(length, 1)
    # Relative to the length without padding; the clamp is for padding, whose label is ignored.
    length_B1 = batch.valid_BL.sum(1, keepdim=True).clamp(min=1)
    return (position_1L * NUM_PARTS // length_B1).clamp(max=NUM_PARTS - 1)


@dataclass(frozen=True, kw_only=True)
class TaskFacts:
    """Facts about a task, for `list`, `show` and the checks of a cell."""

    causal: bool
    """Routing may not depend on later positions; for an encoder-decoder model this concerns the decoder."""
    metric: str
    """Name of the metric that arms are compared by."""
    lower_is_better: bool
    data: str
    """Description of the default data."""
    labels: str = ""
    """Meaning of `Batch.label_BL`, where the data determine which tokens belong to one expert; else empty."""
    is_encoder_decoder: bool = False
    output: Literal["tokens", "classes", "vectors"] = "classes"
    """What the head predicts: ids of the input's vocabulary by logits, other classes by logits, or vectors."""


class Task(ABC):
    """A task with its data ready.

    `prepare` builds it once per process. The trainer then calls, for each step, `train_batch`, the modules of
    `build_embedding` and `build_head` around the transformer, and `loss`; for each evaluation `eval_batches`,
    `compute_sums` per batch and `compute_quality` once. Batches depend on seed and step; evaluation sets are fixed.
    """

    Config: ClassVar[type[TaskConfig]]
    domains: tuple[str, ...]
    """Names of the domains; metrics are also reported per domain."""
    num_held_out: int = 0
    """Number of domains, the last ones, that occur in the test split only."""
    digest: str
    """Identifies the prepared data."""
    eval_digest: str
    """Identifies evaluation set and metric: arms with different digests cannot be compared."""
    sequence_length: int
    """Positions per sequence for which costs are counted; the rounded mean where lengths differ."""
    decoder_length: int | None = None
    """Positions of the decoder of an encoder-decoder model, where `sequence_length` is that of the encoder."""
    vocab_size: int | None = None
    token_count_V: Tensor | None = None
    sample_noun: ClassVar[str] = "samples"
    """What `list_train_samples` lists."""

    @property
    def num_trained_domains(self) -> int:
        """Number of domains, the first ones, that training sees."""
        return len(self.domains) - self.num_held_out

    @property
    def tokens_per_sequence(self) -> int:
        """Positions that the model computes per sequence, encoder and decoder together."""
        return self.sequence_length + (self.decoder_length or 0)

    @classmethod
    @abstractmethod
    def source_digest(cls, config: Any) -> str:
        """Return a digest of the data that the configuration names, without preparing them.

        It is part of every cell's id, so it must be cheap and must not depend on where files are.
        """

    @classmethod
    @abstractmethod
    def prepare(cls, config: Any, cache: Path) -> "Task":
        """Read, split and encode the data, or load them from the folder `cache`; return the task."""

    @abstractmethod
    def train_batch(self, batch_size: int, seed: int, step: int, part: slice = ALL) -> Batch:
        """Return the sequences `part` of the training batch of one step, a function of the arguments only."""

    def list_train_samples(self, batch_size: int, seed: int, step: int) -> list[int]:
        """Return the index in the training split of each sequence of a training batch; empty for generated data."""
        return []

    def token_pairs(self) -> Tensor:
        """Count how often each token id is followed by each other one in the training split: int64 [V, V]."""
        raise UsageError("router.table: 'clustered' needs a task on text")

    def label_kinds(self) -> tuple[LabelKind, ...]:
        """Return the kinds of labels for which evaluations measure the information in a token's expert."""
        return domain_label_kind(self.domains), position_label_kind()

    def count_positions(self, batch_size: int, seed: int, step: int) -> int:
        """Return the number of positions in the training batch of one step without padding, the unit of throughput."""
        return batch_size * self.tokens_per_sequence

    @abstractmethod
    def eval_batches(self, split: str, batch_size: int) -> Sequence[Batch]:
        """Return the fixed evaluation set of a split ("validation" or "test"), the same for every arm.

        No batch mixes trained and held-out domains, so that results in domain do not depend on held-out data.
        """

    @abstractmethod
    def build_embedding(self, d_model: int) -> nn.Module:
        """Return the module input_BL -> x_BLD."""

    @abstractmethod
    def build_head(self, d_model: int) -> nn.Module:
        """Return the module x_BLD -> the output that `loss` reads."""

    @abstractmethod
    def loss(self, output: Any, batch: Batch) -> Tensor:
        """Return loss_BP in nats, one value per prediction; values where `count_BP` is 0 are ignored."""

    def compute_sums(self, output: Any, batch: Batch) -> Mapping[str, Tensor]:
        """Return the sums over each sequence that `compute_quality` needs: tensors whose first dimension is B."""
        nats_BP, weight_BP = self.loss(output, batch).double(), batch.weight_BP.double()
        if batch.count_BP is not None:
            counted_BP = batch.count_BP > 0
            nats_BP, weight_BP = nats_BP.where(counted_BP, 0), weight_BP.where(counted_BP, 0)
        return {"nats": nats_BP.sum(1), "weight": weight_BP.sum(1)}

    def log_probabilities(self, output: Any) -> Tensor:
        """Return the log-probabilities (fp32, classes last) of an output; override for heads without logits."""
        log_p: Tensor = output.float().log_softmax(-1)
        return log_p

    def probe(self, read: Callable[[Batch], Tensor], batch_size: int) -> dict[str, float]:
        """Return additional metrics of a trained model, such as few-shot accuracy; none by default.

        `read` maps a batch to the features x_BLD that enter the head.
        """
        return {}

    @abstractmethod
    def compute_quality(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the metrics of an evaluation set.

        `sums` has the entries of `compute_sums`, added up per domain: fp64, first dimension the domains.
        """

    def compute_baselines(self, split: str) -> Sequence[TrivialBaseline]:
        """Return what trivial methods reach on the evaluation set of a split, one of them the reference; or nothing.

        They learn from the training split alone, and their values are in the metrics of `compute_quality`.
        """
        return ()


TASKS: Registry[type[Task], TaskFacts] = Registry(
    "task", "moebench.tasks", item_type=Task, config_type=TaskConfig, facts_type=TaskFacts
)
