"""What a task is: data, input embedding, head, loss and metric; it knows nothing about routing."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from moebench.registry import Registry


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

    def to(self, device: Any) -> "Batch":
        """Return the batch on another device."""
        return Batch(
            input_BL=self.input_BL.to(device),
            target_BL=self.target_BL.to(device),
            weight_BL=self.weight_BL.to(device),
            domain_B=self.domain_B.to(device),
            valid_BL=None if self.valid_BL is None else self.valid_BL.to(device),
        )


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
    def train_batch(self, batch_size: int, seed: int, step: int) -> Batch:
        """Return the training batch of one step: a function of its arguments, so that any step can be resumed."""

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

    @abstractmethod
    def quality(self, nats_by_domain: Sequence[float], weight_by_domain: Sequence[float]) -> dict[str, float]:
        """Return the metrics from the summed losses and weights of each domain of an evaluation set."""


TASKS: Registry[type[Task], TaskFacts] = Registry("task", "moebench.tasks")
