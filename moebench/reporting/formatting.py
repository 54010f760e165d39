"""Numbers as text: few digits, true minus signs, a dash where there is no value."""

from collections.abc import Callable
from typing import Self

MISSING = "–"
"""What a table shows where there is no value."""
MINUS = "−"


class NumberText(str):
    """A number as tables show it, together with the unrounded number, which files of tables contain."""

    value: float
    interval: tuple[float, float] | None
    """Lower and upper bound, where the text shows an interval."""

    def __new__(cls, text: str, value: float, interval: tuple[float, float] | None = None) -> Self:
        """Return the text; it is a string like any other."""
        number = super().__new__(cls, text)
        number.value, number.interval = value, interval
        return number


def format_number(value: float, decimals: int | None = None) -> str:
    """Format a measurement: four decimals below ten, fewer above, 3e−06 where four decimals would show zero.

    `decimals`: always as many.
    """
    if decimals is None and 0 < abs(value) < 5e-5:
        return NumberText(f"{value:.0e}".replace("-", MINUS), value)
    text = f"{value:,.{_num_decimals(value) if decimals is None else decimals}f}"
    return NumberText(text.replace("-", MINUS), value)


def format_signed(value: float, decimals: int | None = None) -> str:
    """Format a difference with its sign, by default with the decimals of `format_number`."""
    text = f"{value:+,.{_num_decimals(value) if decimals is None else decimals}f}".replace("-", MINUS)
    return NumberText(text, value)


def format_count(value: float | None) -> str:
    """Format a count in thousands, millions, billions with three digits: 1.23M; a dash for None."""
    if value is None:
        return MISSING
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.9995 * size:  # 999,600 reads 1.00M, not 1000k
            return NumberText(f"{_three_digits(value / size)}{unit}", value)
    return NumberText(f"{value:.0f}", value)


def format_bytes(num_bytes: float) -> str:
    """Format an amount of memory with three digits: 512 MiB, 1.50 GiB."""
    for unit, size in (("PiB", 2**50), ("TiB", 2**40), ("GiB", 2**30)):
        if num_bytes >= 0.9995 * size:
            return f"{_three_digits(num_bytes / size)} {unit}"
    return f"{num_bytes / 2**20:.0f} MiB"


def format_percent(share: float | None, decimals: int = 1) -> str:
    """Format a share of 1 in percent; a dash for None."""
    return MISSING if share is None else NumberText(f"{100 * share:.{decimals}f} %", share)


def format_p(p: float | None) -> str:
    """Format a p value with three decimals, and those below 0.001 as such; a dash for None."""
    return MISSING if p is None else NumberText("<0.001" if p < 0.001 else f"{p:.3f}", p)


def format_with_interval(
    value: float | None,
    interval: tuple[float, float] | None,
    form: Callable[[float], str] = format_number,
) -> str:
    """Format a value by `form` and, where there is an interval, half of its width: 2.0000 ± 0.0196."""
    half = f" ± {format_number((interval[1] - interval[0]) / 2)}" if interval else ""
    return MISSING if value is None else NumberText(form(value) + half, value, interval)


def format_plural(n: int, noun: str) -> str:
    """Format a number of items: 1 seed, 2 seeds."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _three_digits(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 9.995 else f"{value:.1f}" if abs(value) < 99.95 else f"{value:.0f}"


def _num_decimals(value: float) -> int:
    return 4 if abs(value) < 10 else 2 if abs(value) < 1000 else 0
