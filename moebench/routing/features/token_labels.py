"""Token labels: the expert that each token belongs to, known in synthetic data only."""

from dataclasses import dataclass

from torch import Tensor, nn
from typing_extensions import override

from moebench.routing.features.feature import BatchView, Feature, TaskFactsView


@dataclass(frozen=True)
class TokenLabels(Feature):
    """int64 label of each token, [T]."""

    description = "a label of each token"

    @override
    def is_provided_by(self, facts: TaskFactsView) -> bool:
        return bool(facts.labels)

    @override
    def from_batch(self, batch: BatchView, x_BLD: Tensor, module: nn.Module | None) -> Tensor | None:
        return batch.label_BL
