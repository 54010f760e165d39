"""Measure how long the processes of a cell have been silent."""

import time

MAX_POLL_S = 5.0
"""Time between two polls that counts as silence: the rest of a longer one is the runner's own, stopped by Ctrl-Z."""
MIN_STOP_TIMEOUT_S, MAX_STOP_TIMEOUT_S = 4.0, 60.0
GAPS_PER_STOP = 3.0


class ActivityMonitor:
    """Silence of a cell: the time since the newest message of any of its processes."""

    def __init__(self) -> None:
        self.silent_s = 0.0
        self._longest_gap_s = 0.0
        self._num_messages = 0
        self._newest_message_at: float | None = None
        self._updated_at = time.monotonic()

    def update(self, newest_message_at: float) -> None:
        """Take the time of the newest message, by `time.monotonic`; call it whenever the runner polls."""
        now = time.monotonic()
        if self._newest_message_at is None:
            self._newest_message_at = newest_message_at  # the start, which is no message
        if newest_message_at != self._newest_message_at:
            if self._num_messages:  # before the first one lie imports and data, which are no step
                self._longest_gap_s = max(self._longest_gap_s, self.silent_s)
            self._num_messages += 1
            self._newest_message_at, self.silent_s = newest_message_at, 0.0
        else:
            self.silent_s += min(now - self._updated_at, MAX_POLL_S)
        self._updated_at = now

    def stop_timeout_s(self, is_saving: bool) -> float:
        """Return how long a cell that was asked to stop may be silent before it is killed.

        A few times its longest silence so far, which contains its slowest step; while it saves, the maximum.
        """
        if is_saving:
            return MAX_STOP_TIMEOUT_S
        return min(max(GAPS_PER_STOP * self._longest_gap_s, MIN_STOP_TIMEOUT_S), MAX_STOP_TIMEOUT_S)
