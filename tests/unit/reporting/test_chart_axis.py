"""Axes of charts: positions and ticks."""

import pytest

from moebench.reporting.html.axis import Axis, format_ticks


def test_positions_and_ticks_of_a_linear_axis() -> None:
    axis = Axis.of([0, 10], margin=0.1)  # -1 to 11
    assert [axis.place(value) for value in (-1, 5, 11)] == [0, 0.5, 1]
    assert [(tick.label, round(tick.at, 3)) for tick in axis.find_ticks(3)] == [("0", 0.083), ("5", 0.5), ("10", 0.917)]


def test_equal_values_and_none_have_an_axis() -> None:
    assert Axis.of([2.0, 2.0]).place(2.0) == pytest.approx(0.5)
    assert Axis.of([0.0]).place(0.0) == pytest.approx(0.5)
    assert Axis.of([]).find_ticks(3)


def test_a_wide_span_is_logarithmic_where_that_is_allowed() -> None:
    axis = Axis.of([1, 100], margin=0, may_be_log=True)
    assert axis.is_log
    assert axis.place(10) == pytest.approx(0.5)
    assert not Axis.of([1, 2], may_be_log=True).is_log
    assert not Axis.of([-1, 100], may_be_log=True).is_log


def test_labels_differ_and_have_units() -> None:
    assert format_ticks([-0.05, 0.0, 0.05]) == ["−0.05", "0.00", "0.05"]
    assert format_ticks([0, 2.5, 5]) == ["0.0", "2.5", "5.0"]
    assert format_ticks([0, 250_000, 500_000]) == ["0", "250k", "500k"]
    assert format_ticks([1.000e12, 1.005e12]) == ["1.000T", "1.005T"]
