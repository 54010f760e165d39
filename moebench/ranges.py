"""Ranges of numeric options: declared beside the fields, checked when a configuration is built, shown in its docs."""

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import get_args

from moebench.errors import require

MAX_WHOLE = 2**31
"""Largest whole number of an option that declares no range."""
MAX_DIGITS = 40
"""Longest number that a message shows in full."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers between two bounds; NaN is in no range."""

    low: float = -math.inf
    high: float = math.inf
    includes_low: bool = True
    includes_high: bool = True
    limit: int | None = None
    """Largest value of a size or a count: more could not be trained, and would only end in the allocator."""

    def __contains__(self, value: float) -> bool:
        """Return whether a number is in the range."""
        above = self.low <= value if self.includes_low else self.low < value
        below = value <= self.high if self.includes_high else value < self.high
        return above and below and (self.limit is None or value <= self.limit)

    def __str__(self) -> str:
        """Return the range as text for an error message."""
        if self.includes_low and self.includes_high and self.high < math.inf:
            return f"between {self.low:g} and {self.high:g}"
        if self.limit is not None:
            return f"{dataclasses.replace(self, limit=None)} and at most {self.limit}"
        parts = [f"{'at least' if self.includes_low else 'greater than'} {self.low:g}"]
        if self.high < math.inf:
            parts.append(f"{'at most' if self.includes_high else 'below'} {self.high:g}")
        elif not self.includes_high:
            parts.append("finite")
        return " and ".join(parts)


def at_least_1_up_to(limit: int) -> Range:
    """Return the range of a size or a count that has a limit."""
    return Range(low=1, limit=limit)


AT_LEAST_0 = Range(low=0)
AT_LEAST_0_FINITE = Range(low=0, includes_high=False)
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
            is_too_large = allowed.limit is not None and value > allowed.limit
            text = f"at most {allowed.limit}" if is_too_large else describe_range(type(config), name, is_short=True)
            require(False, f"{section}.{name}", _shorten(value), text)


def check_undeclared(config_class: type, values: Mapping[str, object], section: str) -> None:
    """Raise UsageError for numbers that nothing can be (not finite, or huge), where an option declares no range.

    It is called before the configuration is built, whose own checks may compute with the number.
    """
    declared = get_ranges(config_class)
    for name, value in values.items():
        key = f"{section}.{name}" if section else name
        if name in declared or isinstance(value, bool):
            continue
        if isinstance(value, float):
            require(math.isfinite(value), key, value, "finite")
        if isinstance(value, int):
            require(abs(value) <= MAX_WHOLE, key, _shorten(value), f"at most {MAX_WHOLE} in size")


def _shorten(value: object) -> str:
    """Return a number as text; a whole number of hundreds of digits by its first ones."""
    try:
        text = str(value)
    except ValueError:  # of more digits than Python converts
        return "a number of thousands of digits"
    return text if len(text) <= MAX_DIGITS else f"{text[:MAX_DIGITS]}... ({len(text)} digits)"


def describe_range(config_class: type, name: str, *, is_short: bool = False) -> str:
    """Return the range of an option as text, and whether it may be null; an empty string where it has no range.

    `is_short`: without the limit of a size or a count.
    """
    allowed = get_ranges(config_class).get(name)
    if allowed is None:
        return ""
    if is_short:
        allowed = dataclasses.replace(allowed, limit=None)
    field = config_class.__dataclass_fields__[name]  # type: ignore[attr-defined]
    return f"{allowed}, or null" if types.NoneType in get_args(field.type) else str(allowed)
