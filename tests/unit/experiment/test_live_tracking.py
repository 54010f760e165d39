"""How long a run that was interrupted waits for its tracker."""

import math
import signal
import time

import pytest

from moebench.experiment.live_tracking import choose_limit_s
from moebench.launch.scheduler import Interrupted


@pytest.mark.parametrize(
    ("since_signal_s", "is_repeated", "expected"),
    [(0.5, False, 2.0), (3.0, False, 1.0), (5.0, False, 0.0), (0.5, True, 0.0)],
)
def test_the_tracker_has_what_the_cells_leave_of_four_seconds(
    monkeypatch: pytest.MonkeyPatch, since_signal_s: float, is_repeated: bool, expected: float
) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 100.0 + since_signal_s)
    interrupted = Interrupted(signal.SIGINT, (), 100.0, is_repeated=is_repeated)
    assert choose_limit_s(interrupted) == expected


def test_a_run_that_ends_by_itself_waits_as_long_as_the_tracker_makes_progress() -> None:
    assert choose_limit_s(None) == math.inf
