"""The schema of `tune` in an experiment file: what each arm chooses before it is compared."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from moebench.conversion import Untyped
from moebench.errors import UsageError, require
from moebench.ranges import Range, at_least_1_up_to, check_ranges


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Settings that each arm chooses on the validation split, by the same grid, before it is trained and compared."""

    RANGES: ClassVar[Mapping[str, Range]] = {"steps": at_least_1_up_to(10**8)}

    grid: dict[str, list[Untyped]] = field(default_factory=dict)
    """Key -> values; every arm tries all combinations of the keys that apply to it. Empty: no tuning."""
    seeds: list[int] = field(default_factory=lambda: [100, 101])
    """Seeds of the tuning runs, which must not be among those that are reported."""
    steps: int | None = None
    """Updates of a tuning run, whose warm-up is scaled in proportion; null: as many as in the arm's reported runs."""
    extra: dict[str, list[Untyped]] = field(default_factory=dict)
    """Key of `grid` -> further values, which arms with fewer trials than others try until they have as many."""

    def __post_init__(self) -> None:
        check_ranges(self, "tune")
        require(len(self.seeds) > 0, "tune.seeds", self.seeds, "a list with at least one seed")
        require(len(set(self.seeds)) == len(self.seeds), "tune.seeds", self.seeds, "a list that names each seed once")
        for option in ("grid", "extra"):
            for key, values in getattr(self, option).items():
                require(len(values) > 0, f"tune.{option}.{key}", values, "a list with at least one value")
        for key in self.extra:
            if key not in self.grid:
                raise UsageError(f"tune.extra.{key}: tune.grid lacks it (allowed: {', '.join(self.grid) or 'none'})")
