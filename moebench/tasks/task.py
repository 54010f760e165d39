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

from torch import Tensor, nn

from moebench.errors import UsageError
from moebench.registry import Registry
from moebench.routing.ranks import Span

ALL = slice(None)
"""Every sequence of a batch."""


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

    def to(self, device: Any) -> "Batch":
        """Return the batch on another device."""
        return self._each(lambda tensor: tensor.to(device))

    def part(self, span: Span) -> "Batch":
        """Return the sequences of one process."""
        return replace(self._each(lambda tensor: tensor[span.part] if tensor.dim() else tensor), span=span)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: Any = {name: change(x) for name, x in tensors.items() if isinstance(x, Tensor)}
        return replace(self, **changed)


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
    num_labels: int | None = None
    """Labels of tokens, where there are any (`Batch.label_BL`)."""

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

    def num_positions(self, batch_size: int, seed: int, step: int) -> int:
        """Count the positions of the training batch of one step, padding left out: what throughput is measured in."""
        return batch_size * self.tokens_per_sequence

    @abstractmethod
    def eval_batches(self, split: str, batch_size: int) -> Sequence[Batch]:
        """Return the fixed evaluation set of a split ("validation" or "test"), the same for every arm."""

    @abstractmethod
    def embedding(self, d_model: int) -> nn.Module:
        """Return the module input_BL -> x_BLD."""

    @abstractmethod
    def head(self, d_model: int) -> nn.Module:
        """Return the module x_BLD -> whatever `loss` reads."""

    @abstractmethod
    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Return loss_BP in nats, one number for each prediction; what it is where `count_BP` is 0 does not matter."""

    def sums(self, output: Tensor, batch: Batch) -> Mapping[str, Tensor]:
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
    def quality(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the metrics from what `sums` returned, added up over an evaluation set: by domain, in fp64."""


def by_domain(name: str, sum_D: Tensor, weight_D: Tensor, domains: Sequence[str]) -> dict[str, float]:
    """Return `name`, the ratio of the sums over all domains, and `name/DOMAIN` for each domain with any weight."""
    found = {name: (sum_D.sum() / weight_D.sum().clamp(min=1)).item()}
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


TASKS: Registry[type[Task], TaskFacts] = Registry("task", "moebench.tasks")
