"""What a router declares for a budget: how a setting becomes a value."""

import pytest

from moebench.routing.budget import Knob

SHIFT = Knob(attribute="shift", low=-1.0, high=3.0, unit=-2.0)
SHARE = Knob(attribute="share", low=0.1, high=0.9, unit=1.0, is_probability=True)


def test_setting_0_is_the_value_that_the_router_was_built_with() -> None:
    assert SHIFT.to_value(0.25, 0) == 0.25
    assert SHARE.to_value(0.4, 0) == pytest.approx(0.4)
    assert SHARE.to_value(0.5, 1) == pytest.approx(0.7311, abs=1e-4)  # 1 / (1 + e^-1)


def test_values_stay_within_their_bounds() -> None:
    assert SHIFT.to_value(0.0, 0.25) == -0.5  # a larger setting is a smaller value here
    assert SHIFT.to_value(0.0, 5) == -1.0
    assert SHARE.to_value(0.4, -50) == 0.1
    assert SHARE.to_value(0.4, 50) == 0.9


def test_a_setting_is_limited_to_where_the_value_still_changes() -> None:
    assert SHIFT.find_bounds(0.0) == (-1.5, 0.5)
    assert SHARE.to_value(0.4, SHARE.find_bounds(0.4)[1]) == pytest.approx(0.9)
