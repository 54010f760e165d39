"""Expert dropout: hidden activations inside experts, in training."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Dropout:
    """Inverted dropout (Switch calls it expert dropout, arXiv:2101.03961, section 2.4): the expectation stays."""

    rate: float
    """Probability that an activation becomes 0; the others are divided by 1 - rate."""
    generator: Generator
    """Of the step and the layer: a recomputed forward makes it anew and draws the same."""

    def __call__(self, hidden_RF: Tensor) -> Tensor:
        """Return the activations, each set to 0 with probability `rate`, the others larger."""
        draw_RF = torch.rand(hidden_RF.shape, generator=self.generator, device=hidden_RF.device)
        return torch.where(draw_RF >= self.rate, hidden_RF / (1 - self.rate), 0.0)
