"""Timed rounds as text and as JSON values, for the reports of all benchmarks."""

from typing import Any

from moebench.bench.timing import MAX_CONTENTION, Spread, Timings
from moebench.reporting.formatting import format_plural


def format_ratio(value: float) -> str:
    """Format a ratio with two decimals below ten."""
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def format_quartiles(spread: Spread) -> str:
    """Format the quartiles of a ratio."""
    return f"{format_ratio(spread.low)}–{format_ratio(spread.high)}"


def describe_rounds(timings: Timings) -> str:
    """Return how many rounds were kept and whether the machine was busy."""
    text = f"{format_plural(len(timings.rounds), 'round')} kept, {timings.num_rejected} rejected"
    if not timings.num_contended:
        return text
    return f"{text}; BUSY MACHINE: others used over {MAX_CONTENTION:.0%} of it in {timings.num_contended} of the kept"


def rounds_to_dict(timings: Timings) -> dict[str, Any]:
    """Return JSON-ready values, with the median time of each variant in milliseconds."""
    return {
        "kept": len(timings.rounds),
        "rejected": timings.num_rejected,
        "contended": timings.num_contended,
        "others": [round_.others for round_ in timings.rounds],
        "ms": {name: timings.median_ms(name) for name in timings.rounds[0].seconds},
    }
