"""Numbers as tables write them."""

import pytest

from moebench.reporting.formatting import (
    format_count,
    format_number,
    format_p,
    format_percent,
    format_plural,
    format_signed,
    format_with_interval,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (7, "7"), (999.6, "1.00k"), (14_650, "14.7k"), (1.234e6, "1.23M"), (2.5e11, "250B")],
)
def test_format_count(value, text):
    assert format_count(value) == text


def test_numbers_and_p_values():
    assert [format_number(x) for x in (1.23456, -0.5, 12.346, 123456.7, 0.0, 0.00003)] == [
        "1.2346", "−0.5000", "12.35", "123,457", "0.0000", "3e−05"
    ]  # fmt: skip
    assert [format_signed(x) for x in (0.01, -0.01)] == ["+0.0100", "−0.0100"]
    assert [format_p(p) for p in (None, 0.0004, 0.0496)] == ["–", "<0.001", "0.050"]


def test_percent_and_plural():
    assert [format_percent(share) for share in (0.0125, None)] == ["1.2 %", "–"]
    assert format_percent(0.696, decimals=0) == "70 %"
    assert [format_plural(n, "seed") for n in (1, 2)] == ["1 seed", "2 seeds"]


def test_a_value_with_half_of_its_interval():
    assert format_with_interval(2.0, (1.5, 2.5)) == "2.0000 ± 0.5000"
    assert format_with_interval(-0.01, None, format_signed) == "−0.0100"
    assert format_with_interval(None, None) == "–"
