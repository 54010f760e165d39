"""Networkless experts: which experts are without a network (zero, copy, constant), for routers that prefer them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from moebench.routing.features.feature import Feature


@dataclass(frozen=True)
class NetworklessExperts(Feature):
    """tuple[bool, ...], True for each expert without a network; a build-time value of layouts of one group."""

    description = "the kinds of experts"

    @override
    def from_bank(self, has_network_E: Sequence[bool]) -> Any:
        return tuple(not has_network for has_network in has_network_E)
