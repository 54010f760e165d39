"""Positions in attention: where vectors are in their sequences, and rotary angles."""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from moebench.model_config import ModelConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class PositionTable:
    """Positions of the vectors of a batch in their sequences, where some are missing or padding."""

    position_BL: Tensor
    """int64: position in the full sequence."""
    valid_BL: Tensor
    """bool: False where there is no vector; at least one of each sequence is True."""
    length: int
    """Length of the full sequences."""
    document_BL: Tensor | None = None
    """int64: the document that each vector is of; it attends only to vectors of its own. None: to all."""

    @classmethod
    def of_documents(cls, document_BL: Tensor) -> "PositionTable":
        """Return the positions of full sequences of several documents, without padding.

        They continue over documents: rotary attention sees only differences of positions inside one.
        """
        table = cls.of_padded(torch.ones_like(document_BL, dtype=torch.bool))
        return replace(table, document_BL=document_BL)

    @classmethod
    def of_padded(cls, valid_BL: Tensor) -> "PositionTable":
        """Return the positions of full sequences with padding; in one of padding alone the first position counts."""
        length = valid_BL.shape[1]
        position_BL = torch.arange(length, device=valid_BL.device).expand_as(valid_BL)
        first_L = torch.arange(length, device=valid_BL.device) == 0
        valid_BL = valid_BL | (first_L & ~valid_BL.any(1, keepdim=True))
        return cls(position_BL=position_BL, valid_BL=valid_BL, length=length)

    def mask(self, *, causal: bool) -> Tensor | None:
        """Return which vectors each one attends to, bool [B, 1, L or 1, L]; None: all, or all earlier ones if causal.

        In a causal model, padding after the last vector is in the future of all; otherwise it must be masked.
        """
        if self.document_BL is None:
            return None if causal else self.valid_BL[:, None, None, :]
        mask_BLL = self.document_BL.unsqueeze(2) == self.document_BL.unsqueeze(1)
        mask_BLL = mask_BLL.tril() if causal else mask_BLL & self.valid_BL.unsqueeze(1)
        return mask_BLL.unsqueeze(1)


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary positions (arXiv:2104.09864), and how their angles are scaled for sequences longer than usual."""

    theta: float = 10000.0
    scaling: Literal["none", "linear", "ntk", "llama3"] = "none"
    factor: float = 1.0
    original_length: int = 1
    """Used by llama3 alone, as are the next two."""
    low_frequency: float = 1.0
    high_frequency: float = 4.0

    @classmethod
    def of(cls, model: ModelConfig) -> "Rotary":
        """Return the rotary positions of a configuration."""
        return cls(
            theta=model.rope_theta,
            scaling=model.rope_scaling,
            factor=model.rope_factor,
            original_length=model.rope_original_length or 1,
            low_frequency=model.rope_low_frequency,
            high_frequency=model.rope_high_frequency,
        )

    def table(self, length: int, head_width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cos and sin [length, head_width / 2] of the rotary angles (arXiv:2104.09864, eq. 15), fp32.

        The same tensors for equal arguments, since every layer of every step needs them: do not change them.
        """
        return _compute_table(self, length, head_width, device)

    def frequencies(self, head_width: int, device: torch.device) -> Tensor:
        """Return the angle in radians from one position to the next, [head_width / 2], fp32."""
        power = torch.arange(0, head_width, 2, device=device, dtype=torch.float32) / head_width
        if self.scaling == "ntk":
            # The slowest angle, at power (d - 2) / d, is divided by the factor; a single pair has power 0 alone.
            theta = self.theta * self.factor ** (head_width / max(head_width - 2, 1))
            scaled: Tensor = theta**-power
            return scaled
        frequency: Tensor = self.theta**-power
        if self.scaling == "linear":
            return frequency / self.factor
        if self.scaling == "llama3":
            turns = self.original_length * frequency / (2 * math.pi)
            kept = (turns - self.low_frequency) / (self.high_frequency - self.low_frequency)
            kept = kept.clamp(0, 1)
            return kept * frequency + (1 - kept) * frequency / self.factor
        return frequency


@lru_cache(maxsize=16)
def _compute_table(rotary: Rotary, length: int, head_width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    frequency = rotary.frequencies(head_width, device)
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequency)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (first half, second half) of the head dimension by its position's angle."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
