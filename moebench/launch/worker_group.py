"""The processes of one cell: waited for together, and within bounds when one of them fails."""

import time
from collections.abc import Sequence
from typing import Any

from moebench.launch.diagnosis import Verdict, judge
from moebench.launch.local_worker import Member
from moebench.runs.cell import Cell

GRACE_S = 4.0
"""How long the others may take to say what they know after the first failure: its cause may be among it."""


class Team:
    """One cell at work; `patience_s` is added to the grace where words travel over a network."""

    def __init__(self, cell: Cell, members: Sequence[Member], patience_s: float = 0.0) -> None:
        self.cell = cell
        self.members = members
        self.timeout_s = cell.config.parallel.timeout_s
        self.grace_s = GRACE_S + patience_s
        self.started = time.monotonic()
        self.deadline = float("inf")

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started

    @property
    def waitables(self) -> list[Any]:
        """What becomes readable when there is something to look at."""
        return [thing for member in self.members for thing in member.waitables]

    def look(self) -> dict[str, Any] | None:
        """Take note of what there is to know; return the newest progress of the first process."""
        news = [member.look() for member in self.members]
        self.deadline = min(self.deadline, time.monotonic() + self._left_s())
        return news[0]

    @property
    def is_over(self) -> bool:
        """Whether all have ended, or those that have not were waited for long enough."""
        return all(member.has_ended for member in self.members) or time.monotonic() >= self.deadline

    def _left_s(self) -> float:
        """Return how long the others may take once one of them has said its last word, or ended without any."""
        words = [member.ending().status for member in self.members]
        if words[0] in ("found", "busy"):
            return 0.0  # the others wait for one that will not come
        silent = any(member.has_ended and word is None for member, word in zip(self.members, words, strict=True))
        if silent or "failed" in words or words[0] is not None:
            return self.grace_s
        return float("inf") if words == [None] * len(words) else self.timeout_s + self.grace_s

    def stop(self) -> None:
        """Ask all to save and end: they agree on the step among themselves."""
        for member in self.members:
            member.stop()

    def kill(self) -> None:
        """End all that have not ended."""
        for member in self.members:
            member.kill()

    def close(self) -> Verdict:
        """Judge how it ended, and leave no process behind."""
        verdict = judge([member.ending() for member in self.members], self.timeout_s)
        self.kill()
        return verdict
