"""Dropout in the transformer, whose draws are a function of the seed, the step and the sequence's index in the batch.

Draws are made for the whole batch, and each process takes those of its own sequences: it drops what a single process
would drop. Nothing is stored, so a resumed or repeated step draws the same.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moebench.models.positions import PositionTable
from moebench.ranks import Span
from moebench.seeds import make_generator


@dataclass(frozen=True, kw_only=True)
class SequenceDropout:
    """Inverted dropout at one point of a model in one forward pass: survivors are divided by 1 - rate."""

    rate: float
    """Probability that a value becomes 0."""
    purpose: tuple[object, ...]
    """Seed of the draws: that of the run, the step, the micro-batch and the point in the model."""
    span: Span | None = None
    """Sequences of the batch that are on this process; None: all."""
    num_slots: int | None = None
    """Equal parts of the heads that draw each on its own, where processes may differ in their number."""

    def drop(self, x_BLD: Tensor, positions: PositionTable | None = None) -> Tensor:
        """Return vectors with some of their values dropped; the draws belong to positions in the full sequence."""
        if positions is None:
            return self._apply(x_BLD, self._draw(x_BLD.shape, x_BLD.device))
        shape = torch.Size((x_BLD.shape[0], positions.length, x_BLD.shape[2]))
        index_BL1 = positions.position_BL.unsqueeze(-1)
        return self._apply(x_BLD, torch.take_along_dim(self._draw(shape, x_BLD.device), index_BL1, 1))

    def drop_weights(self, weight_BHLM: Tensor, positions: PositionTable | None = None) -> Tensor:
        """Return weights of attention with some dropped; `positions`: those of the queries, which are the keys' too."""
        if self.num_slots is not None:
            slots = [replace(self, purpose=(*self.purpose, slot), num_slots=None) for slot in range(self.num_slots)]
            parts = zip(slots, weight_BHLM.chunk(self.num_slots, dim=1), strict=True)
            return torch.cat([slot.drop_weights(part, positions) for slot, part in parts], dim=1)
        if positions is None:
            return self._apply(weight_BHLM, self._draw(weight_BHLM.shape, weight_BHLM.device))
        shape = torch.Size((*weight_BHLM.shape[:2], positions.length, positions.length))
        index_B1L = positions.position_BL.unsqueeze(1)
        uniform = torch.take_along_dim(self._draw(shape, weight_BHLM.device), index_B1L.unsqueeze(-1), 2)
        return self._apply(weight_BHLM, torch.take_along_dim(uniform, index_B1L.unsqueeze(2), 3))

    def _draw(self, shape: torch.Size, device: torch.device) -> Tensor:
        total = shape[0] if self.span is None else self.span.total
        generator = make_generator(*self.purpose, device=device)
        uniform = torch.rand(total, *shape[1:], generator=generator, device=device)
        return uniform if self.span is None else uniform[self.span.as_slice]

    def _apply(self, value: Tensor, uniform: Tensor) -> Tensor:
        return torch.where(uniform >= self.rate, value / (1 - self.rate), 0.0)
