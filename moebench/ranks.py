"""The processes that share a batch, as routers, layers and losses see them: usually one.

Each process (rank) holds some sequences of the batch. A statistic over the whole batch goes through `Ranks`;
`moebench.parallel` has the implementation for several processes, chosen when the model is built.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Ranks(Protocol):
    """The processes among which a batch is divided, in the order of its sequences.

    Both operations are collective: every rank must make the same calls in the same order.
    """

    @property
    def size(self) -> int:
        """Number of ranks."""

    @property
    def rank(self) -> int:
        """Index of this process, from 0."""

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum over ranks, on every rank.

        Differentiable: the gradient is that of the sum of all ranks' losses. A loss that every rank computes from the
        sum thus has `size` times its own gradient, which the mean over ranks taken in training makes exact.
        """

    def gather(self, value_T: Tensor, lengths: Sequence[int] = ()) -> Tensor:
        """Return the values of all ranks, concatenated along the first dimension in rank order.

        The ranks may hold different lengths. Differentiable, as `sum`. `lengths`: those of all ranks, where they are
        known; else they are exchanged first.
        """


@dataclass(frozen=True)
class SingleRank:
    """A single process that holds the whole batch."""

    size: int = 1
    rank: int = 0
    device: torch.device | None = None
    """Device that values must be on, as if they were sent; None: any device."""

    def sum(self, value: Tensor) -> Tensor:
        """Return the value unchanged."""
        check_device(value, self.device)
        return value

    def gather(self, value_T: Tensor, lengths: Sequence[int] = ()) -> Tensor:
        """Return the values unchanged."""
        check_device(value_T, self.device)
        return value_T


SINGLE_RANK = SingleRank()


def check_device(value: Tensor, device: torch.device | None) -> None:
    """Raise ValueError when a value is not on the device of the process group: NCCL sends from GPUs alone."""
    if device is not None and value.device != device:
        raise ValueError(f"cannot exchange a tensor on {value.device}: the process group uses {device}")


def sum_together(values: Sequence[Tensor], ranks: Ranks) -> list[Tensor]:
    """Return the sums over ranks of several tensors with one exchange; differentiable, as `Ranks.sum`.

    They are added in fp64 and rounded once, so that neither the order of ranks nor the other tensors matter.
    """
    if ranks.size == 1 or not values:
        return [ranks.sum(value) for value in values]
    summed = ranks.sum(torch.cat([value.reshape(-1).double() for value in values]))
    parts = torch.split(summed, [value.numel() for value in values])
    return [part.view(value.shape).to(value.dtype) for part, value in zip(parts, values, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Span:
    """The contiguous part of the whole batch that a process holds, counted in sequences or in tokens."""

    start: int
    """Index of the first element held here."""
    length: int
    """Number of elements held here."""
    total: int
    """Number of elements on all processes together."""
    lengths: tuple[int, ...] = ()
    """Number of elements on each process, by rank; empty: not known here."""

    @property
    def as_slice(self) -> slice:
        """Slice of the whole batch."""
        return slice(self.start, self.start + self.length)

    def to_tokens(self, sequence_length: int) -> "Span":
        """Convert a span of sequences to the span of their tokens."""
        return Span(
            start=self.start * sequence_length,
            length=self.length * sequence_length,
            total=self.total * sequence_length,
            lengths=tuple(length * sequence_length for length in self.lengths),
        )


@dataclass(frozen=True, kw_only=True)
class Scopes:
    """The ranks over which each kind of statistic of a layer is taken."""

    batch: Ranks = SINGLE_RANK
    """For capacity, and for routers that choose among the tokens of the whole batch."""
    balance: Ranks = SINGLE_RANK
    """For losses."""
    world: Ranks = SINGLE_RANK
    """All ranks, whatever the other scopes: router state must stay equal on each of them."""
