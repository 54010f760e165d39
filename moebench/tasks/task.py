"""What a task is: data, input embedding, head, loss and metric; it knows nothing about routing."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from moebench.registry import Registry
from moebench.routing.ranks import Span

ALL = slice(None)
"""Every sequence of a batch."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """One batch of sequences, as tensors on one device."""

    input_BL: Tensor
    """What the embedding reads (token ids for language)."""
    target_BL: Tensor
    """What the head should say."""
    weight_BL: Tensor
    """Size of each target in units of the metric (bytes for language); a loss is summed, then divided by these."""
    domain_B: Tensor
    """int64 index into the task's domains."""
    valid_BL: Tensor | None = None
    """bool, False at padding; None when nothing is padded."""
    span: Span | None = None
    """Which sequences of a batch that is divided among processes these are; None: all."""
    valid_in_step: Tensor | None = None
    """int64: valid positions of all micro-batches of the step that are here; None when nothing is padded."""

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
    """A router that sees later tokens of a sequence would cheat."""
    metric: str
    """The quality that arms are compared by."""
    lower_is_better: bool
    data: str
    """The data it uses unless told otherwise."""


class Task(ABC):
    """A task, with its data ready: built once per process by `prepare`."""

    Config: ClassVar[type]
    domains: tuple[str, ...]
    digest: str
    """Identifies the prepared data."""
    eval_digest: str
    """Identifies the evaluation set and the metric: arms with different ones cannot be compared."""
    sequence_length: int
    vocab_size: int | None = None
    token_count_V: Tensor | None = None

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

    @abstractmethod
    def eval_batches(self, split: str, batch_size: int) -> Sequence[Batch]:
        """Return the fixed evaluation set of a split ("validation" or "test"), the same for every arm."""

    @abstractmethod
    def embedding(self, d_model: int) -> nn.Module:
        """Return the module input_BL -> x_BLD."""

    @abstractmethod
    def head(self, d_model: int) -> nn.Module:
        """Return the module x_BLD -> whatever `token_loss` reads."""

    @abstractmethod
    def token_loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Return loss_BL in nats, one number for each position."""

    def log_probabilities(self, output: Tensor) -> Tensor:
        """Return what the output says as fp32 log-probabilities, classes last; heads that give no logits override."""
        return output.float().log_softmax(-1)

    @abstractmethod
    def quality(self, nats_by_domain: Sequence[float], weight_by_domain: Sequence[float]) -> dict[str, float]:
        """Return the metrics from the summed losses and weights of each domain of an evaluation set."""


TASKS: Registry[type[Task], TaskFacts] = Registry("task", "moebench.tasks")
