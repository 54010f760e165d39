"""What a task is: data, input embedding, head, loss and metric; it knows nothing about routing."""

import re
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moebench.errors import UsageError
from moebench.ranks import Span
from moebench.registry import Registry

ALL = slice(None)
"""Every sequence of a batch."""
OUT_OF_DOMAIN = "out_of_domain"
"""Ends the names of metrics over the domains that training did not see."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """One batch of sequences, as tensors on one device: B sequences of L positions, with P predictions each."""

    input_BL: Tensor
    """What the embedding reads: token ids [B, L] (int64), or vectors, patches or frames [B, L, width] (floating)."""
    target_BP: Tensor
    """What the head should say: a token at each position (P = L), a class of the whole sequence (P = 1), a vector
    [B, P, width], or [B, S] the symbols of a transcript whose loss is one number (P = 1)."""
    weight_BP: Tensor
    """Size of each prediction in units of the metric (bytes for language)."""
    domain_B: Tensor
    """int64 index into the task's domains."""
    label_BL: Tensor | None = None
    """int64 label of each position that the experts see, where the task knows which of them belong together."""
    valid_BL: Tensor | None = None
    """bool, False at padding, for each position that the experts see; None when nothing is padded. Padding takes part
    in no routing and no attention."""
    decoder_input_BP: Tensor | None = None
    """What the decoder reads at each position, of a model that has one: token ids (int64); `input_BL` is then what the
    encoder reads."""
    decoder_valid_BP: Tensor | None = None
    """bool, as `valid_BL`, for the positions of the decoder."""
    count_BP: Tensor | None = None
    """int64: by how many the loss of a prediction is divided in the mean: 0 where nothing is to be predicted, the
    number of symbols where one loss is that of many; None: 1 each."""
    span: Span | None = None
    """Which sequences of a batch that is divided among processes these are; None: all."""
    count_in_step: Tensor | None = None
    """int64: the sum of `count_BP` over all micro-batches of the step that are here; None where that is None."""

    @property
    def token_id_BL(self) -> Tensor | None:
        """Token ids, which some routers read; None where the input is not made of tokens."""
        return None if self.input_BL.is_floating_point() else self.input_BL

    @property
    def num_predictions(self) -> int:
        """P."""
        return self.weight_BP.shape[1]

    @property
    def decoder_batch(self) -> "Batch":
        """Return the batch as the decoder sees it: `input_BL` and `valid_BL` are those of its positions."""
        assert self.decoder_input_BP is not None
        own = replace(self, input_BL=self.decoder_input_BP, valid_BL=self.decoder_valid_BP, label_BL=None)
        return replace(own, decoder_input_BP=None, decoder_valid_BP=None)

    def to(self, device: Any) -> "Batch":
        """Return the batch on another device."""
        return self._each(lambda tensor: tensor.to(device))

    def part(self, span: Span) -> "Batch":
        """Return the sequences of one process."""
        return replace(self._each(lambda tensor: tensor[span.as_slice] if tensor.dim() else tensor), span=span)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: Any = {name: change(x) for name, x in tensors.items() if isinstance(x, Tensor)}
        return replace(self, **changed)


NUM_PARTS = 8
"""Parts that positions of a sequence are told apart by."""


@dataclass(frozen=True, kw_only=True)
class LabelKind:
    """One kind of label that every position has: what an evaluation asks the experts to know."""

    name: str
    """Of the metric, load/information/NAME."""
    values: tuple[str, ...]
    """What the labels 0, 1, ... stand for."""
    read: Callable[[Batch], Tensor]
    """The label of each position of a batch that the experts see, int64, of a shape that broadcasts to [B, L]; at
    padding any of the labels. An encoder-decoder is asked for each half apart (`Batch.decoder_batch`)."""


def domain_label_kind(domains: Sequence[str]) -> LabelKind:
    """Return the domain of a token's sequence as a kind of label."""
    return LabelKind(name="domain", values=tuple(domains), read=lambda batch: batch.domain_B.unsqueeze(1))


def position_label_kind() -> LabelKind:
    """Return the part of its sequence in which a token stands, of NUM_PARTS as long as each other."""
    parts = tuple(f"{part + 1}/{NUM_PARTS}" for part in range(NUM_PARTS))
    return LabelKind(name="position", values=parts, read=_part_BL)


def _part_BL(batch: Batch) -> Tensor:
    length = batch.input_BL.shape[1]
    place_1L = torch.arange(length, device=batch.input_BL.device).unsqueeze(0)
    if batch.valid_BL is None:
        return place_1L * NUM_PARTS // max(length, 1)
    # Parts of what is there: padding behind a short sequence belongs to none.
    length_B1 = batch.valid_BL.sum(1, keepdim=True).clamp(min=1)
    return (place_1L * NUM_PARTS // length_B1).clamp(max=NUM_PARTS - 1)


@dataclass(frozen=True, kw_only=True)
class TaskFacts:
    """What is known about a task."""

    causal: bool
    """A router that sees later tokens of a sequence would cheat; with an encoder and a decoder, in the decoder."""
    metric: str
    """The quality that arms are compared by."""
    lower_is_better: bool
    data: str
    """The data it uses unless told otherwise."""
    labels: str = ""
    """What the label of a token is, where the data says which tokens belong to one expert; empty where it does not."""
    is_encoder_decoder: bool = False
    """The model is an encoder, and a decoder that says the targets."""


class Task(ABC):
    """A task, with its data ready: built once per process by `prepare`."""

    Config: ClassVar[type]
    domains: tuple[str, ...]
    num_held_out: int = 0
    """How many domains, the last of them, are in no training batch and not in the validation split."""
    digest: str
    """Identifies the prepared data."""
    eval_digest: str
    """Identifies the evaluation set and the metric: arms with different ones cannot be compared."""
    sequence_length: int
    """Positions of a sequence, for which costs are counted; the rounded mean where sequences differ in length."""
    decoder_length: int | None = None
    """Positions of the decoder, where there is one; `sequence_length` is then that of the encoder."""
    vocab_size: int | None = None
    token_count_V: Tensor | None = None

    @property
    def num_trained_domains(self) -> int:
        """Domains that training sees, the first ones."""
        return len(self.domains) - self.num_held_out

    @property
    def tokens_per_sequence(self) -> int:
        """Positions that the model computes for one sequence: what a run's tokens are counted in."""
        return self.sequence_length + (self.decoder_length or 0)

    @classmethod
    @abstractmethod
    def source_digest(cls, config: Any) -> str:
        """Return a digest of the data that the configuration names: quick, and without preparing it."""

    @classmethod
    @abstractmethod
    def prepare(cls, config: Any, cache: Path) -> "Task":
        """Read, split and encode the data (or take it from the cache) and return the task."""

    @abstractmethod
    def train_batch(self, batch_size: int, seed: int, step: int, part: slice = ALL) -> Batch:
        """Return a part of the training batch of one step: a function of its arguments, so any step can be resumed.

        `part`: the sequences that this process needs, of `batch_size`.
        """

    def token_pairs(self) -> Tensor:
        """Return how often each token id is followed by each in the training split, int64 [V, V]."""
        raise UsageError("router.table: 'clustered' needs a text, which this task does not read")

    def label_kinds(self) -> tuple[LabelKind, ...]:
        """Return the kinds of labels of tokens, of which an evaluation says how much of each the experts know."""
        return domain_label_kind(self.domains), position_label_kind()

    def count_positions(self, batch_size: int, seed: int, step: int) -> int:
        """Count the positions of the training batch of one step, padding left out: what throughput is measured in."""
        return batch_size * self.tokens_per_sequence

    @abstractmethod
    def eval_batches(self, split: str, batch_size: int) -> Sequence[Batch]:
        """Return the fixed evaluation set of a split ("validation" or "test"), the same for every arm.

        No batch has sequences of both trained and held-out domains: what is found in domain depends on nothing else.
        """

    @abstractmethod
    def build_embedding(self, d_model: int) -> nn.Module:
        """Return the module input_BL -> x_BLD."""

    @abstractmethod
    def build_head(self, d_model: int) -> nn.Module:
        """Return the module x_BLD -> whatever `loss` reads."""

    @abstractmethod
    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Return loss_BP in nats, one number for each prediction; what it is where `count_BP` is 0 does not matter."""

    def compute_sums(self, output: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        """Return what `quality` needs, summed over each sequence: tensors whose first dimension is B."""
        nats_BP, weight_BP = self.loss(output, batch).double(), batch.weight_BP.double()
        if batch.count_BP is not None:
            counted_BP = batch.count_BP > 0
            nats_BP, weight_BP = nats_BP.where(counted_BP, 0), weight_BP.where(counted_BP, 0)
        return {"nats": nats_BP.sum(1), "weight": weight_BP.sum(1)}

    def log_probabilities(self, output: Tensor) -> Tensor:
        """Return what the output says as fp32 log-probabilities, classes last; heads that give no logits override."""
        return output.float().log_softmax(-1)

    def probe(self, read: Callable[[Batch], Tensor], batch_size: int) -> dict[str, float]:
        """Return more metrics of a model that has been trained; most tasks have none.

        `read`: a batch to the vectors x_BLD that the head would read.
        """
        return {}

    @abstractmethod
    def compute_quality(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the metrics from what `sums` returned, added up over an evaluation set: by domain, in fp64."""


def average_by_domain(
    name: str, sum_D: Tensor, weight_D: Tensor, domains: Sequence[str], num_held_out: int = 0
) -> dict[str, float]:
    """Return `name`, the ratio of the sums over all domains, and `name/DOMAIN` for each domain with any weight.

    The last `num_held_out` domains are not in the first; `name/out_of_domain` is the ratio over them.
    """

    def ratio(part: slice) -> float:
        return (sum_D[part].sum() / weight_D[part].sum().clamp(min=1)).item()

    first = len(domains) - num_held_out
    found = {name: ratio(slice(first))}
    if weight_D[first:].any():
        found[f"{name}/{OUT_OF_DOMAIN}"] = ratio(slice(first, None))
    for domain, value, weight in zip(metric_names(tuple(domains)), sum_D.tolist(), weight_D.tolist(), strict=True):
        if weight:
            found[f"{name}/{domain}"] = value / weight
    return found


@lru_cache(maxsize=64)
def metric_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return names of data as parts of metrics' names, which trackers restrict: accents go, other signs become `_`.

    Names that would be the same, or nothing, get their place in the list.
    """
    plain = []
    for name in names:
        letters = unicodedata.normalize("NFKD", name)
        letters = "".join(c for c in letters if not unicodedata.combining(c))
        parts = [part.strip(" .") for part in re.sub(r"[^A-Za-z0-9_\-.:/ ]", "_", letters).split("/")]
        plain.append("/".join(part for part in parts if part)[:100].strip(" ./"))
    number = Counter(plain)
    return tuple(f"{name}_{i}" if number[name] > 1 or not name else name for i, name in enumerate(plain))


TASKS: Registry[type[Task], TaskFacts] = Registry("task", "moebench.tasks", item_type=Task, facts_type=TaskFacts)
