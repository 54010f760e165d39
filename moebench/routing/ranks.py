"""The processes that share a batch, as losses, layers and routers see them: usually one.

Each process (rank) holds some sequences of the batch. What a statistic over the batch needs from the others goes
through `Ranks`; `parallel` brings the one for many processes, chosen when the model is built.
"""

from dataclasses import dataclass
from typing import Protocol

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
class Alone:
    """One process that holds the whole batch."""

    size: int = 1
    rank: int = 0

    def sum(self, value: Tensor) -> Tensor:
        """Return the value."""
        return value

    def gather(self, value_T: Tensor) -> Tensor:
        """Return the values."""
        return value_T


ALONE = Alone()


@dataclass(frozen=True, kw_only=True)
class Span:
    """Which tokens of the whole batch a process holds."""

    start: int
    """Index of its first token."""
    total: int
    """Tokens of the whole batch."""


@dataclass(frozen=True, kw_only=True)
class Scopes:
    """Over whose tokens the statistics of a layer go."""

    batch: Ranks = ALONE
    """Capacity, and routers that choose among the tokens of the whole batch."""
    balance: Ranks = ALONE
    """Losses."""
