"""Curves in one line, by hand."""

import math

import pytest

from moebench.reporting.sparkline import ASCII, BLOCKS, can_show_blocks, draw_sparkline


def test_levels_go_from_the_lowest_to_the_highest_value() -> None:
    assert draw_sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == BLOCKS
    assert draw_sparkline([7, 0], 8) == "█▁"
    assert draw_sparkline([0, 7], 8, levels=ASCII) == "_#"


def test_neighbours_are_averaged() -> None:
    assert draw_sparkline([0, 0, 1, 1, 0, 2], 3) == "▁██"
    assert len(draw_sparkline(list(range(1000)), 40)) == 40


def test_a_curve_that_does_not_change_is_flat() -> None:
    assert draw_sparkline([3, 3], 8) == "▁▁"
    assert draw_sparkline([3, 3], 8, low=0) == "██"
    assert draw_sparkline([0, 0], 8, low=0) == "▁▁"


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_values_that_are_missing_are_gaps(value: float | None) -> None:
    assert draw_sparkline([0, value, 1], 3) == "▁ █"
    assert draw_sparkline([value], 3) == " "
    assert draw_sparkline([], 3) == ""


def test_large_values_do_not_overflow() -> None:
    assert draw_sparkline([1e308, 1e308, -1e308], 1) in BLOCKS


@pytest.mark.parametrize(
    ("encoding", "expected"), [("utf-8", True), ("ascii", False), ("latin-1", False), ("cp437", False), (None, False)]
)
def test_encodings_with_blocks(encoding: str | None, expected: bool) -> None:
    assert can_show_blocks(encoding) is expected
