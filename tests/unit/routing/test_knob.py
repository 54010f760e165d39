"""What a router declares for a budget: how a setting becomes a value."""

import pytest

from moebench.routing.budget import Knob

SHIFT = Knob(attribute="shift", low=-1.0, high=3.0, unit=-2.0)
RATIO = Knob(attribute="share", low=0.1, high=1.0, unit=1.0, is_ratio=True)


def test_setting_0_is_the_value_that_the_router_was_built_with() -> None:
    assert SHIFT.to_value(0.25, 0) == 0.25
    assert RATIO.to_value(0.4, 0) == pytest.approx(0.4)


def test_values_stay_within_their_bounds() -> None:
    assert SHIFT.to_value(0.0, 0.25) == -0.5  # a larger setting is a smaller value here
    assert SHIFT.to_value(0.0, 5) == -1.0
    assert RATIO.to_value(0.4, -50) == 0.1
    assert RATIO.to_value(0.4, 50) == 1.0


def test_a_setting_is_limited_to_where_the_value_still_changes() -> None:
    assert SHIFT.limit(0.0, 5) == 0.5
    assert SHIFT.limit(0.0, -5) == -1.5
    assert RATIO.to_value(0.4, RATIO.limit(0.4, 50)) == pytest.approx(1.0)
