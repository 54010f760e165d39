"""The tracker of a run: started with it, and given the time to send what is pending at its end."""

import math
import time
from collections.abc import Callable
from pathlib import Path

from moebench.launch.containment import Containment
from moebench.launch.scheduler import Interrupted
from moebench.tracking.address import default_uri
from moebench.tracking.tracker import Tracker, TrackerStatus

INTERRUPT_LIMIT_S = 4.0
"""How long after the signal an interrupted run has ended: what its cells leave of it is the tracker's."""
TRACKER_LIMIT_S = 2.0
"""How long an interrupted run waits for its tracker at most."""


def start_tracker(results: Path, uri: str | None, experiment: str, containment: Containment) -> Tracker | None:
    """Return the tracker, or None if it cannot be started."""
    started = None
    with containment.contain("tracker"):
        tracker = Tracker(results, uri or default_uri(results), experiment)
        tracker.start()
        started = tracker
    return started


def stop_tracker(
    tracker: Tracker | None,
    note: Callable[[str], None],
    interrupted: Interrupted | None,
    containment: Containment,
    sync: str,
) -> str | None:
    """Send what is pending; return what the tracker has missed, or None.

    `note` prints a line for the user; `sync` is the command that sends later what is missed.
    """

    def show_wait(status: TrackerStatus) -> None:
        hint = f"Ctrl-C: do not wait, {sync} sends the rest"
        note(f"waiting for the tracker, {status.values} values sent ({hint})")

    problem: str | None = (
        f"the tracker did not end as it should, and its state is unknown; nothing is lost: run {sync} later"
    )
    if tracker is not None:
        with containment.contain("tracker"):
            status = tracker.stop(choose_limit_s(interrupted), on_wait=show_wait)
            problem = None if status.ok else status.reason
    return problem


def choose_limit_s(interrupted: Interrupted | None) -> float:
    """Return how long a run may wait for its tracker; a user who has asked to stop twice waits no longer."""
    if interrupted is None:
        return math.inf
    remaining_s = 0.0 if interrupted.is_repeated else interrupted.at + INTERRUPT_LIMIT_S - time.monotonic()
    return max(0.0, min(TRACKER_LIMIT_S, remaining_s))
