"""Ranges of numeric options: declared beside the fields, checked when a configuration is built, shown in its docs."""

import dataclasses
import math
import types
from typing import get_args

from moebench.errors import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers between two bounds; NaN is in no range."""

    low: float = -math.inf
    high: float = math.inf
    includes_low: bool = True
    includes_high: bool = True

    def __contains__(self, value: float) -> bool:
        """Return whether a number is in the range."""
        above = self.low <= value if self.includes_low else self.low < value
        below = value <= self.high if self.includes_high else value < self.high
        return above and below

    def __str__(self) -> str:
        """Return the range as text for an error message."""
        if self.includes_low and self.includes_high and self.high < math.inf:
            return f"between {self.low:g} and {self.high:g}"
        parts = [f"{'at least' if self.includes_low else 'greater than'} {self.low:g}"]
        if self.high < math.inf:
            parts.append(f"{'at most' if self.includes_high else 'below'} {self.high:g}")
        elif not self.includes_high:
            parts.append("finite")
        return " and ".join(parts)


AT_LEAST_0 = Range(low=0)
AT_LEAST_1 = Range(low=1)
POSITIVE = Range(low=0, includes_low=False)
POSITIVE_FINITE = Range(low=0, includes_low=False, includes_high=False)
FRACTION = Range(low=0, high=1)
BELOW_1 = Range(low=0, high=1, includes_high=False)


def get_ranges(config_class: type) -> dict[str, Range]:
    """Return the range of each option that has one, inherited options included."""
    ranges: dict[str, Range] = {}
    for cls in reversed(config_class.__mro__):
        ranges |= vars(cls).get("RANGES", {})
    return ranges


def check_ranges(config: object, section: str) -> None:
    """Raise UsageError naming `section` and the option whose value is outside its range; null is not checked."""
    for name, allowed in get_ranges(type(config)).items():
        value = getattr(config, name)
        if value is not None and value not in allowed:
            require(False, f"{section}.{name}", value, describe_range(type(config), name))


def describe_range(config_class: type, name: str) -> str:
    """Return the range of an option as text, and whether it may be null; an empty string where it has no range."""
    allowed = get_ranges(config_class).get(name)
    if allowed is None:
        return ""
    field = config_class.__dataclass_fields__[name]  # type: ignore[attr-defined]
    return f"{allowed}, or null" if types.NoneType in get_args(field.type) else str(allowed)
