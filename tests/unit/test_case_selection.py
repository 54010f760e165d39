"""Slow cases are left out of the collection only where no test marked slow can be selected."""

import gc

import pytest
from support.case_selection import can_select_slow


@pytest.mark.parametrize(
    ("markers", "expected"),
    [
        ("", True),
        ("slow", True),
        ("gpu", True),
        ("not slow", False),
        ("not slow and not gpu", False),
        ("not (slow or gpu)", False),
        ("slow or not slow", True),
        ("not slow or gpu", True),
    ],
)
def test_markers(markers: str, expected: bool) -> None:
    assert can_select_slow(markers) == expected


def test_garbage_is_collected_while_tests_run() -> None:
    assert gc.isenabled()
