"""Curves in one line of text."""

import math
from collections.abc import Sequence
from itertools import pairwise

BLOCKS, ASCII = "▁▂▃▄▅▆▇█", "_.-:=+*#"
"""Levels from the lowest to the highest."""
GAP = " "
"""Where there is no finite value."""


def can_show_blocks(encoding: str | None) -> bool:
    """Return whether text in this encoding can have block characters; else `ASCII` takes their place."""
    try:
        BLOCKS.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def draw_sparkline(
    values: Sequence[float | None], width: int, *, low: float | None = None, levels: str = BLOCKS
) -> str:
    """Return a curve of at most `width` characters, each the mean of its part of the values.

    The lowest value has the first level and the highest the last; `low` is a value that the first level has at most,
    so that a curve that stays near it looks flat. Values that are None or not finite are left out.
    """
    parts = [_mean(part) for part in _split(values, width)]
    finite = [part for part in parts if part is not None]
    if not finite:
        return GAP * len(parts)
    bottom, top = min(finite), max(finite)
    bottom = bottom if low is None else min(low, bottom)
    span = top - bottom
    return "".join(GAP if part is None else levels[_find_level(part - bottom, span, len(levels))] for part in parts)


def _find_level(height: float, span: float, num_levels: int) -> int:
    if not 0 < span < math.inf:
        return 0
    return min(int(height / span * num_levels), num_levels - 1)


def _split(values: Sequence[float | None], width: int) -> list[Sequence[float | None]]:
    num_parts = min(max(width, 1), len(values))
    bounds = [round(part * len(values) / num_parts) for part in range(num_parts + 1)] if num_parts else [0]
    return [values[start:end] for start, end in pairwise(bounds)]


def _mean(values: Sequence[float | None]) -> float | None:
    finite = [value for value in values if value is not None and math.isfinite(value)]
    # Divided first: the sum of two large numbers is infinite.
    return sum(value / len(finite) for value in finite) if finite else None
