"""Sequence groups: consecutive sequences of a batch that are computed together."""

from dataclasses import dataclass

from typing_extensions import override

from moebench.routing.features.feature import Feature


@dataclass(frozen=True)
class SequenceGroups(Feature):
    """Keeps each group of `size` consecutive sequences on one process; it has no value."""

    size: int
    description = "groups of sequences"

    @property
    @override
    def sequence_group_size(self) -> int:
        return self.size
