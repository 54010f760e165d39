"""Numbers as a reader wants them: few digits, true minus signs, a dash where there is nothing."""

NOTHING = "–"
MINUS = "−"


def number(value: float) -> str:
    """Format a metric: four decimals below ten, fewer above, 3e−06 where four decimals would show zero."""
    if 0 < abs(value) < 5e-5:
        return f"{value:.0e}".replace("-", MINUS)
    return f"{value:,.{_decimals(value)}f}".replace("-", MINUS)


def signed(value: float, decimals: int | None = None) -> str:
    """Format a difference with its sign, by default with the decimals of `number`."""
    return f"{value:+,.{_decimals(value) if decimals is None else decimals}f}".replace("-", MINUS)


def format_count(value: float | None) -> str:
    """Format a count in thousands, millions, billions with three digits: 1.23M; a dash for None."""
    if value is None:
        return NOTHING
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.9995 * size:  # 999,600 reads 1.00M, not 1000k
            return f"{_three_digits(value / size)}{unit}"
    return f"{value:.0f}"


def _three_digits(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 9.995 else f"{value:.1f}" if abs(value) < 99.95 else f"{value:.0f}"


def _decimals(value: float) -> int:
    return 4 if abs(value) < 10 else 2 if abs(value) < 1000 else 0


def p_value(p: float | None) -> str:
    """Format a p value with three decimals; nothing below 0.001 is told apart."""
    return NOTHING if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def count(n: int, noun: str) -> str:
    """Format a number of things: 1 seed, 2 seeds."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
