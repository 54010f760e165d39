"""Previous logits: the router logits of the MoE layer below."""

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from moebench.routing.features.feature import Feature
from moebench.routing.values import LayerRecord


@dataclass(frozen=True)
class PreviousLogits(Feature):
    """fp32 router logits of the nearest MoE layer below, [T, E of that layer], with their gradient.

    Absent in the first MoE layer. The layer below may have more or fewer experts.
    """

    description = "the router logits of the layer below"

    @override
    def from_layer(self, record: LayerRecord) -> Tensor | None:
        return record.routing.logits_TE
