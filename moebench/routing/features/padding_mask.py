"""Padding mask: which tokens are padding, for routers that read a token's neighbours."""

from dataclasses import dataclass

from torch import Tensor, nn
from typing_extensions import override

from moebench.routing.features.feature import BatchView, Feature


@dataclass(frozen=True)
class PaddingMask(Feature):
    """bool, [T], False at padding; absent where nothing is padded.

    `RouteContext.valid_T` is also False for tokens that the router above a group of experts sent elsewhere, which are
    neighbours nevertheless.
    """

    description = "the padding mask"

    @override
    def from_batch(self, batch: BatchView, x_BLD: Tensor, module: nn.Module | None) -> Tensor | None:
        return batch.valid_BL
