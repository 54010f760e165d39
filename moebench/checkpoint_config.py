"""The options of how long a run is and which of its states are saved: part of the section `train`."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

from moebench.errors import UsageError, require

MAX_KEPT = 100
"""Weights kept of one run."""
ALLOWED = "steps from 1 to train.steps, or percentages of them above 0% and up to 100%, such as [1%, 5%, 20%, 50%]"
_PERCENTAGE = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,6})?) ?%")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Options of `train` that choose the number of steps, and at which of them weights are saved."""

    LEFT_OUT_AT_DEFAULT: ClassVar[tuple[str, ...]] = ("skip_batches", "compile")
    """Keys of `train` that are left out of a cell's id at their defaults, so that ids from before they existed stay."""

    steps: int = 1800
    """Number of optimizer updates."""
    skip_batches: int = 0
    """Number of batches, in the order of the data, that are left out before the first update: those of the steps of a
    parent, so that a run that continues one (`init`) reads what comes next, and runs of one seed can share the data
    among them."""
    checkpoint_every: int = 300
    """Updates between checkpoints."""
    keep_checkpoints: list[int | str] = field(default_factory=list)
    """Steps whose weights are kept, as numbers or as percentages of steps: [1%, 5%, 20%, 50%]. They are stored without
    the optimizer's state, in a third of a checkpoint's size or less. `moebench probe --show history` reads them."""

    @cached_property
    def kept_steps(self) -> list[int]:
        """Steps before the last whose weights are kept; those of the last one always are."""
        return [step for step in parse_kept_steps(self.keep_checkpoints, self.steps) if step < self.steps]

    def check_kept_steps(self) -> None:
        """Raise UsageError for an entry of `keep_checkpoints` that is no step of the run."""
        parse_kept_steps(self.keep_checkpoints, self.steps)


def parse_kept_steps(entries: Sequence[int | str], num_steps: int) -> list[int]:
    """Return the steps whose weights are kept, in order; a percentage is rounded to a step, at least the first.

    Raises UsageError for an entry that is no step of a training of `num_steps` steps.
    """
    require(len(entries) <= MAX_KEPT, "train.keep_checkpoints", f"{len(entries)} entries", f"at most {MAX_KEPT}")
    return sorted({_parse_step(entry, num_steps) for entry in entries})


def _parse_step(entry: int | str, num_steps: int) -> int:
    percentage = _PERCENTAGE.fullmatch(entry.strip()) if isinstance(entry, str) else None
    if percentage is not None and 0 < float(percentage[1]) <= 100:
        return max(1, math.floor(float(percentage[1]) / 100 * num_steps + 0.5))
    if isinstance(entry, int) and 1 <= entry <= num_steps:
        return entry
    raise UsageError(f"train.keep_checkpoints: '{entry}' is none of the {num_steps} steps (allowed: {ALLOWED})")
