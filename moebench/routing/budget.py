"""What a router declares so that its executed compute can be held at a target."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Knob:
    """An attribute of a router, a number that `forward` reads, which sets how many experts its tokens use.

    With `layout.match=measured_flops` the attribute is a buffer, fp32 scalar, that training adjusts. A setting u maps
    to start + u * unit, in logits where the value `is_probability`, within `low` and `high`: u = 0 is the value that
    the router was built with, and a larger u means more compute.
    """

    attribute: str
    low: float
    high: float
    unit: float
    """Change of the value, or of its logit, by which compute rises by the order of itself; negative where a larger
    value means less compute."""
    is_probability: bool = False
    in_training: bool = True
    """Whether it acts in training too; otherwise in evaluation alone, where the rule differs."""

    def to_value(self, start: float, setting: float) -> float:
        """Return the value at a setting."""
        return float(self.to_values(start, torch.tensor(setting, dtype=torch.float64)))

    def to_values(self, start: float, setting: Tensor) -> Tensor:
        """Return the values at settings, fp64, on their device."""
        value = self._to_linear(start) + setting * self.unit
        if self.is_probability:
            value = 1 / (1 + (-value).exp())
        return value.clamp(self.low, self.high)

    def find_bounds(self, start: float) -> tuple[float, float]:
        """Return the lowest and the highest setting at which the value is within its bounds."""
        ends = [(self._to_linear(bound) - self._to_linear(start)) / self.unit for bound in (self.low, self.high)]
        return min(ends), max(ends)

    def _to_linear(self, value: float) -> float:
        if not self.is_probability:
            return value
        value = min(max(value, self.low), self.high)  # a router may be built with a certain event
        return math.log(value / (1 - value))
