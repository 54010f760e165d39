"""The points of a curve: quality and measured cost of an arm under one setting, over its seeds."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from moebench.analysis import statistics as st
from moebench.analysis.sweep.axes import Axis

LOAD_METRICS = ("load/drop_rate", "load/unserved", "load/experts_per_token")
"""Measured beside the quality."""
AS_TRAINED = "as trained"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One arm under one setting, over its seeds."""

    arm: str
    settings: Mapping[str, str]
    """Key -> value, of the axes that the arm has; empty: as trained."""
    quality: Mapping[int, float]
    """Seed -> metric."""
    flops: Mapping[int, float]
    """Seed -> forward FLOPs per token, executed on the test split."""
    load: Mapping[str, float]
    """Means over the seeds."""
    relative_flops: float
    """FLOPs over those of the same arm as planned: dropped assignments cost nothing."""
    is_dense: bool = False

    @property
    def label(self) -> str:
        """The arm and its setting, for sentences."""
        settings = ", ".join(f"{key.split('.')[-1]}={value}" for key, value in self.settings.items())
        return f"{self.arm} ({settings})" if settings else self.arm

    @property
    def mean(self) -> float:
        """Mean quality over the seeds."""
        return fmean(self.quality.values())

    @property
    def interval(self) -> st.Interval | None:
        """95 % t interval of the mean quality; None below three seeds."""
        return st.mean_interval(list(self.quality.values()))

    @property
    def mean_flops(self) -> float:
        """Mean over the seeds."""
        return fmean(self.flops.values())

    @property
    def flops_interval(self) -> st.Interval | None:
        """95 % t interval of the mean FLOPs; None below three seeds."""
        return st.mean_interval(list(self.flops.values()))

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "arm": self.arm,
            "settings": dict(self.settings),
            "mean": self.mean,
            "interval": list(self.interval) if self.interval else None,
            "seeds": {str(seed): value for seed, value in self.quality.items()},
            "flops_per_token": self.mean_flops,
            "flops_interval": list(self.flops_interval) if self.flops_interval else None,
            "flops_by_seed": {str(seed): value for seed, value in self.flops.items()},
            "load": dict(self.load),
            "relative_flops": self.relative_flops,
        }


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The points of all arms, with a note for each cell that is left out."""

    title: str
    metric: str
    lower_is_better: bool
    axes: tuple[Axis, ...]
    points: tuple[Point, ...]
    notes: tuple[str, ...] = ()

    @property
    def direction(self) -> str:
        """Which values of the metric are better."""
        return "lower" if self.lower_is_better else "higher"

    def group_by_line(self) -> dict[str, list[Point]]:
        """Return line of the figure -> its points: those of an arm that differ in the first axis alone."""
        lines: dict[str, list[Point]] = {}
        for point in self.points:
            others = [f"{axis.name}={point.settings[axis.key]}" for axis in self.axes[1:] if axis.key in point.settings]
            lines.setdefault(", ".join([point.arm, *others]), []).append(point)
        return lines
