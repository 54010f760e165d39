"""Norms: before each part of a block, after the last block, and of queries and keys."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from moebench.model_config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class NormStyle:
    """Which norm a model uses everywhere."""

    kind: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    eps: float | None = None
    """None: torch's default, the machine epsilon of the precision in RMSNorm and 1e-5 in LayerNorm."""

    @classmethod
    def of(cls, model: ModelConfig) -> "NormStyle":
        """Return the norm of a configuration."""
        return cls(kind=model.norm, eps=model.norm_eps)

    def build(self, width: int) -> nn.Module:
        """Build the norm of vectors of a width; gains start at 1, biases at 0."""
        if self.kind == "rmsnorm":
            return nn.RMSNorm(width, eps=self.eps)
        return nn.LayerNorm(width) if self.eps is None else nn.LayerNorm(width, eps=self.eps)


DEFAULT_NORM = NormStyle()


class QueryKeyNorm(nn.Module):
    """Norms of queries and keys, whose gains all heads share, or of all heads together, before positions.

    Of each head: Qwen3 (arXiv:2505.09388); of all together: OLMo 2 (arXiv:2501.00656).
    """

    def __init__(self, norm: NormStyle, query_width: int, key_width: int) -> None:
        """`query_width`, `key_width`: values that are normed together, a divisor of the width of a vector."""
        super().__init__()
        self.query_width, self.key_width = query_width, key_width
        self.query = norm.build(query_width)
        self.key = norm.build(key_width)

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normed queries and keys, in their own precision; the last dimension has all heads."""
        normed_query = _norm_parts(self.query, query, self.query_width)
        normed_key = _norm_parts(self.key, key, self.key_width)
        return normed_query, normed_key


def _norm_parts(norm: nn.Module, x: Tensor, width: int) -> Tensor:
    normed: Tensor = norm(torch.unflatten(x, -1, (-1, width)))
    return normed.flatten(-2).to(x.dtype)
