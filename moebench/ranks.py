"""The processes that share a batch, as losses, layers and routers see them: usually one.

Each process (rank) holds some sequences of the batch. What a statistic over the batch needs from the others goes
through `Ranks`; `parallel` brings the one for many processes, chosen when the model is built.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Ranks(Protocol):
    """The processes among which a batch is divided, in the order of its sequences.

    All of them must make the same calls in the same order.
    """

    @property
    def size(self) -> int:
        """How many there are."""

    @property
    def rank(self) -> int:
        """Which of them this one is, from 0."""

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum over ranks, on every rank.

        Differentiable: the gradient is that of the sum of all ranks' losses, so of a loss that every rank computes
        alike it is `size` times the loss's own, and the mean over ranks that training takes is exact.
        """

    def gather(self, value_T: Tensor) -> Tensor:
        """Return the values of all ranks, joined along the first dimension in rank order; differentiable as `sum`.

        The ranks may have different lengths.
        """


@dataclass(frozen=True)
class SingleRank:
    """One process that holds the whole batch."""

    size: int = 1
    rank: int = 0
    device: torch.device | None = None
    """Where values must be, as if they were sent; None: anywhere."""

    def sum(self, value: Tensor) -> Tensor:
        """Return the value."""
        check_device(value, self.device)
        return value

    def gather(self, value_T: Tensor) -> Tensor:
        """Return the values."""
        check_device(value_T, self.device)
        return value_T


SINGLE_RANK = SingleRank()


def check_device(value: Tensor, device: torch.device | None) -> None:
    """Raise ValueError when a value to be sent is not on the device of the processes: NCCL sends from GPUs alone."""
    if device is not None and value.device != device:
        raise ValueError(f"a value to be sent is on {value.device}, and the processes exchange what is on {device}")


@dataclass(frozen=True, kw_only=True)
class Span:
    """Which part of the whole batch a process holds, counted in tokens or in sequences."""

    start: int
    """Index of the first one that is here."""
    length: int
    """How many are here."""
    total: int
    """How many there are on all processes."""

    @property
    def part(self) -> slice:
        """The same as a slice of the whole batch."""
        return slice(self.start, self.start + self.length)

    def to_tokens(self, sequence_length: int) -> "Span":
        """Return the span of tokens of a span of sequences of `factor` tokens."""
        return Span(start=self.start * factor, length=self.length * factor, total=self.total * factor)


@dataclass(frozen=True, kw_only=True)
class Scopes:
    """Over whose tokens the statistics of a layer go."""

    batch: Ranks = SINGLE_RANK
    """Capacity, and routers that choose among the tokens of the whole batch."""
    balance: Ranks = SINGLE_RANK
    """Losses."""
    world: Ranks = SINGLE_RANK
    """All there are, whatever the other scopes: the state of routers must stay the same on each."""
