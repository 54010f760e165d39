"""The value of a trivial baseline; torch-free, because processes without torch read stored ones."""

from collections.abc import Mapping
from dataclasses import dataclass

FORMAT = 1
"""Part of the key of stored baselines: raised when one of them is computed in another way."""


@dataclass(frozen=True, kw_only=True)
class TrivialBaseline:
    """What a method without a neural network reaches on an evaluation set, in the metrics of the task."""

    name: str
    """Letters, digits, spaces, hyphens: it becomes a part of a metric's name."""
    meaning: str
    """How it is computed, in one clause that follows the name."""
    values: Mapping[str, float]
    """By the names that results use: `bits_per_byte`, `bits_per_byte/code`, `bits_per_byte/out_of_domain`."""
    is_reference: bool = False
    """Whether this is the baseline of its task that the baseline arm of an experiment must beat."""
