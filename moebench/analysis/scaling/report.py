"""Coefficients of the bilinear law as text."""

import math

from moebench.reporting.formatting import MINUS

DECIMALS = {"a": 4, "b": 4, "c": 4, "d": 3, "e_start": 2, "e_max": 0}


def format_coefficient(name: str, value: float) -> str:
    """Format a coefficient with the digits that a fit can give."""
    if math.isinf(value):
        return "∞"
    return f"{value:,.{DECIMALS[name]}f}".replace("-", MINUS)


def describe_interval(name: str, low: float, high: float) -> str:
    """Format an interval."""
    return f"[{format_coefficient(name, low)}, {format_coefficient(name, high)}]"
