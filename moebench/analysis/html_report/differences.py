"""The differences from the baseline as a forest plot: a row for each arm, positions in percent of the width."""

from collections.abc import Collection
from dataclasses import dataclass, replace

from moebench.analysis.compare.shown_arms import find_tone
from moebench.analysis.compare.values import Comparison
from moebench.reporting.formatting import format_signed, format_with_interval
from moebench.reporting.html.axis import Axis, Tick


@dataclass(frozen=True, kw_only=True)
class ForestRow:
    """An arm; positions from 0 to 1, None where there is no value."""

    arm: str
    tone: str
    verdict: str
    mean: float | None
    interval: tuple[float, float] | None
    seeds: tuple[float, ...]
    """The difference of each seed."""
    text: str


@dataclass(frozen=True, kw_only=True)
class Forest:
    """The rows with their common axis."""

    rows: tuple[ForestRow, ...]
    zero: float
    margin: tuple[float, float] | None
    """Bounds of equivalence; None before the baseline has a mean."""
    ticks: tuple[Tick, ...]
    title: str
    better: str
    """The side that is better: left or right."""

    def select(self, arms: Collection[str]) -> "Forest":
        """Return the rows of some arms, on the same axis."""
        return replace(self, rows=tuple(row for row in self.rows if row.arm in arms))


def build_forest(comparison: Comparison) -> Forest | None:
    """Return the forest plot, best arm first; None without any difference."""
    sign = 1 if comparison.lower_is_better else -1
    pairs = sorted(comparison.differences, key=lambda pair: (pair.mean is None, sign * (pair.mean or 0.0)))
    values = {arm.arm: arm.values for arm in comparison.arms}
    base = values[comparison.baseline]
    shown = [bound for pair in pairs if pair.mean is not None for bound in (pair.mean, *(pair.interval or ()))]
    if not shown:
        return None
    margin = comparison.margin_value
    axis = Axis.of([0.0, *shown])
    rows = tuple(
        ForestRow(
            arm=pair.arm,
            tone=find_tone(comparison, pair.arm),
            verdict=comparison.describe_verdict(pair.arm),
            mean=None if pair.mean is None else axis.place(pair.mean),
            interval=(axis.place(pair.interval[0]), axis.place(pair.interval[1])) if pair.interval else None,
            seeds=tuple(_clip(axis.place(values[pair.arm][seed] - base[seed])) for seed in pair.seeds),
            text=format_with_interval(pair.mean, pair.interval, format_signed),
        )
        for pair in pairs
    )
    return Forest(
        rows=rows,
        zero=axis.place(0.0),
        margin=None if margin is None else (_clip(axis.place(-margin)), _clip(axis.place(margin))),
        ticks=tuple(axis.find_ticks(4)),
        title=f"{comparison.metric.replace('_', ' ')} minus {comparison.baseline}",
        better="left" if comparison.lower_is_better else "right",
    )


def _clip(position: float) -> float:
    return min(max(position, 0.0), 1.0)
