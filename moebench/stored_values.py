"""Values of files that others may have written, checked when they are read."""

from typing import Any

MAX_COUNT = 1 << 62
"""Sums of a few counts fit 64 bits."""


def require_count(value: Any) -> int:
    """Return an integer from 0 up to `MAX_COUNT`; raise ValueError for any other value."""
    if type(value) is not int or not 0 <= value < MAX_COUNT:
        raise ValueError(f"it has a {type(value).__name__} in place of a number from 0 on")
    return value


def require_name(value: Any) -> str:
    """Return a text; raise ValueError for any other value."""
    if not isinstance(value, str):
        raise ValueError(f"it has a {type(value).__name__} in place of a name")
    return value
