"""Declared metrics as tables show them: headers, formatted values, explanations."""

from collections.abc import Callable, Mapping

from moebench.metric import Format
from moebench.metrics import METRICS
from moebench.reporting.formatting import (
    MISSING,
    NumberText,
    format_count,
    format_number,
    format_p,
    format_percent,
    format_signed,
)

FORMATTERS: Mapping[Format, Callable[[float], str]] = {
    "number": format_number,
    "signed": lambda value: format_signed(value, 1),
    "count": format_count,
    "percent": format_percent,
    "whole percent": lambda value: format_percent(value, 0),
    "p": format_p,
    ".0f": "{:.0f}".format,
    ".1f": "{:.1f}".format,
    ".2f": "{:.2f}".format,
    ".3f": "{:.3f}".format,
}
UNITS_SHOWN = ("MiB", "GiB")
"""Units that follow the value: the header does not name them."""


def metric_headers(*names: str) -> tuple[str, ...]:
    """Return the column headers of declared metrics."""
    return tuple(METRICS[name].header for name in names)


def format_metric(name: str, value: float | None) -> str:
    """Format a value of a declared metric; a dash for None."""
    metric = METRICS[name]
    if value is None:
        return MISSING
    unit = f" {metric.unit}" if metric.unit in UNITS_SHOWN else ""
    return NumberText(FORMATTERS[metric.format](value) + unit, value)


def explain_metrics(*names: str) -> str:
    """Return a legend of declared metrics: a sentence for each, which begins with its column header."""
    return " ".join(f"{METRICS[name].header}: {_uncapitalize(METRICS[name].meaning)}" for name in names)


def _uncapitalize(sentence: str) -> str:
    """Return a sentence for use after a colon: in lower case, but a formula such as `I(x)` keeps its capital."""
    return sentence[0].lower() + sentence[1:] if sentence[1:2].islower() or sentence[1:2] == " " else sentence
