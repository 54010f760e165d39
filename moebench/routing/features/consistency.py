"""Consistency: two passes over each training batch, whose draws differ and whose outputs should agree."""

from dataclasses import dataclass

from torch import Tensor, nn
from typing_extensions import override

from moebench.routing.features.feature import Feature, FeatureLoss, TrainingPasses


@dataclass(frozen=True)
class Consistency(Feature):
    """Adds the divergence between the predictions of the two passes to the loss; it has no value."""

    coefficient: float
    description = "two passes over each batch"
    num_passes = 2

    @override
    def compute_loss(self, passes: TrainingPasses, module: nn.Module | None) -> FeatureLoss:
        first, second = (passes.log_probabilities(output) for output in passes.outputs)
        return FeatureLoss(name="consistency", raw=passes.mean(divergence(first, second)), coefficient=self.coefficient)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return ½ Σ (p - q)(log p - log q) over the last dimension, in nats: symmetric, 0 for equal distributions."""
    return 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)
