"""Axes of charts in SVG: from values to positions, with ticks."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from matplotlib.ticker import LogLocator, MaxNLocator

from moebench.reporting.formatting import MINUS

UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
LOG_RATIO = 8
"""Positive values that span at least this factor are drawn on a logarithmic axis."""


@dataclass(frozen=True, kw_only=True)
class Tick:
    """A labelled value of an axis."""

    at: float
    """Position: 0 at the low end, 1 at the high end."""
    label: str


@dataclass(frozen=True, kw_only=True)
class Axis:
    """The range of an axis, low < high."""

    low: float
    high: float
    is_log: bool = False

    @classmethod
    def of(cls, values: Iterable[float], *, margin: float = 0.06, may_be_log: bool = False) -> "Axis":
        """Return an axis that shows all values, finite numbers, with a margin as a share of their span."""
        numbers = list(values) or [0.0, 1.0]
        low, high = min(numbers), max(numbers)
        if may_be_log and low > 0 and high >= LOG_RATIO * low:
            factor = (high / low) ** margin
            return cls(low=low / factor, high=high * factor, is_log=True)
        span = (high - low) or max(abs(high), 1e-9) * 0.1
        return cls(low=low - margin * span, high=high + margin * span)

    def place(self, value: float) -> float:
        """Return the position of a value; outside of 0 to 1 where the axis does not show it."""
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def find_ticks(self, number: int) -> list[Tick]:
        """Return about `number` ticks at round values."""
        locator = (
            LogLocator(subs=(1, 2, 5)) if self.is_log else MaxNLocator(number, steps=[1, 2, 2.5, 5, 10], min_n_ticks=2)
        )
        values = [float(value) for value in locator.tick_values(self.low, self.high) if self.low <= value <= self.high]
        while self.is_log and len(values) > 2 * number:
            values = values[::2]
        labels = format_ticks(values)
        return [Tick(at=self.place(value), label=label) for value, label in zip(values, labels, strict=True)]


def format_ticks(values: Sequence[float]) -> list[str]:
    """Return labels that differ; from 10,000 on in thousands, millions, billions (B), trillions (T)."""
    largest = max(map(abs, values), default=0.0)
    size, unit = next(((size, unit) for size, unit in UNITS if largest >= max(size, 1e4)), (1.0, ""))
    scaled = [value / size for value in values]
    step = min((abs(b - a) for a, b in pairwise(scaled)), default=0.0) or 1.0
    decimals = min(max(0, -math.floor(math.log10(step) + 1e-9)), 12)
    if not math.isclose(step, round(step, decimals), rel_tol=1e-6):
        decimals += 1  # 2.5 between ticks
    labels = [f"{value:.{decimals}f}".replace("-", MINUS) for value in scaled]
    return ["0" if unit and not value else label + unit for label, value in zip(labels, values, strict=True)]
