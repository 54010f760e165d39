"""Cells over processes that torchrun or SLURM has started: the first program leads, the others follow its word.

The first is the runner, exactly as alone. Each of the others waits for its word, which names a cell, runs its part in a
process of its own (so that what crashes there does not take the follower with it), and says how that ended.
"""

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from moebench.errors import UsageError
from moebench.launch.diagnosis import Ending
from moebench.launch.launcher import Given, require_devices
from moebench.launch.local_worker import Member, NearMember, signals_noted, start_server
from moebench.launch.rendezvous import LOST_S, START_S, AbandonedError, Pulse, Wire
from moebench.parallel.mesh import check_world_size
from moebench.parallel.process_info import SINGLE_PROCESS
from moebench.runs.cell import Cell
from moebench.runs.folder import RunFolder

POLL_S = 0.1
GONE_S = 3.0
"""A program without a heartbeat for so long is named as gone when something has failed anyway."""
FAREWELL_S = 5.0
"""How long the first waits for the others to have heard its last word."""


class FarMember:
    """A process of a cell that another program runs."""

    def __init__(self, wire: Wire, number: int, pulse: Pulse) -> None:
        self.rank = pulse.rank
        self.has_ended = False
        self.key = f"{number}/{self.rank}"
        self.wire = wire
        self.pulse = pulse
        self.heard_at = time.monotonic()
        self.word: dict[str, Any] = {}
        """How it stands, as its program says."""

    @property
    def waitables(self) -> list[Any]:
        """None: the store is asked."""
        return []

    def look(self) -> dict[str, Any] | None:
        """Read what its program says, and whether that lives."""
        word = self.wire.hear(f"state/{self.key}")
        if word is not None and word != self.word:
            self.word, self.heard_at = word, time.monotonic()
        self.has_ended = bool(self.word.get("has_ended")) or self.pulse.silent_s() > LOST_S
        return None

    def stop(self) -> None:
        """Have it asked to save and end."""
        self.wire.say(f"stop/{self.key}", {})

    def kill(self) -> None:
        """Have it ended; its program does so before it listens to anything else."""
        if not self.has_ended:
            with contextlib.suppress(AbandonedError):
                self.wire.say(f"kill/{self.key}", {})

    def ending(self) -> Ending:
        """Return how it ended."""
        known = {key: value for key, value in self.word.items() if key != "has_ended"}
        silent_s = self.pulse.silent_s()
        gone = silent_s > GONE_S and not self.word.get("has_ended")
        silent_s = silent_s if gone else time.monotonic() - self.heard_at
        return Ending(rank=self.rank, **known, is_gone=gone, silent_s=silent_s)


class ClusterLauncher:
    """Starts this node's first process of a cell here and has the others started where they are."""

    most_jobs = 1
    patience_s = 2.0

    def __init__(self, given: Given, wire: Wire) -> None:
        self.process_info = given.process_info
        self.wire = wire
        self.pulses = [Pulse(wire, rank) for rank in range(1, given.process_info.world_size)]
        self.numbers = count()
        self.exit_code = 1
        """What all end with; set before the end."""

    def check(self, cells: Sequence[Cell]) -> None:
        """Raise UsageError unless every cell wants as many processes as there are, and each can have its device."""
        for cell in cells:
            check_world_size(cell.config.parallel, self.process_info)
            require_devices(cell.config.train, self.process_info.local_world_size)

    def await_all(self) -> None:
        """Return when every program has shown itself; raise UsageError when one does not come."""
        deadline = time.monotonic() + START_S
        for pulse in self.pulses:
            while pulse.silent_s() >= 0 and not pulse.has_begun:
                if time.monotonic() > deadline:
                    raise UsageError(
                        f"rank {pulse.rank} of {self.process_info.world_size} has not come within {START_S:.0f} s"
                        " (under SLURM every process is started by srun)"
                    )
                time.sleep(POLL_S)

    def members(self, cell: Cell, results: Path) -> list[Member]:
        """Start the processes of a cell: the first here, the others by a word."""
        folder = RunFolder.of(results, cell.id).path
        if self.process_info.world_size == 1:
            return [NearMember(folder, results, SINGLE_PROCESS)]
        number = next(self.numbers)
        process_info = replace(self.process_info, namespace=f"{self.process_info.namespace}/cell/{number}")
        word = {"folder": str(folder.absolute()), "results": str(results.absolute()), "meeting": process_info.namespace}
        self.wire.say(f"word/{number}", word)
        far = [FarMember(self.wire, number, pulse) for pulse in self.pulses]
        return [NearMember(folder, results, process_info), *far]

    def release(self, cell: Cell) -> None:
        """Nothing: each program has its GPU for good."""

    def stop_wish(self) -> int | None:
        """Return the signal that another program was sent."""
        word = self.wire.hear("wish")
        return int(word["signal"]) if word else None

    def end(self) -> None:
        """Tell the others the exit code and give them time to hear it."""
        with contextlib.suppress(AbandonedError):
            self.wire.say(f"word/{next(self.numbers)}", {"exit_code": self.exit_code})
            deadline = time.monotonic() + FAREWELL_S
            for pulse in self.pulses:
                while time.monotonic() < deadline and not self.wire.hear(f"bye/{pulse.rank}"):
                    time.sleep(POLL_S)


@contextlib.contextmanager
def leading(given: Given) -> Iterator[ClusterLauncher]:
    """Lead the programs of this start; whatever happens, they hear of the end."""
    wire = Wire(given)
    launch = ClusterLauncher(given, wire)
    try:
        launch.await_all()
        yield launch
    except UsageError:
        launch.exit_code = 2
        raise
    finally:
        launch.end()
        wire.close()


def follow(given: Given) -> int:
    """Do what the first program says until it ends, and return its exit code; silent unless it is lost."""
    try:
        wire = Wire(given)
        try:
            return _Follower(given, wire).run()
        finally:
            wire.close()
    except AbandonedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


class _Follower:
    def __init__(self, given: Given, wire: Wire) -> None:
        self.process_info = given.process_info
        self.wire = wire
        self.leader = Pulse(wire, 0)
        self.signals: list[int] = []
        self.passed_on = False

    def run(self) -> int:
        with signals_noted(self.signals.append):
            start_server()
            for number in count():
                while not (word := self.wire.hear(f"word/{number}")):
                    self._attend()
                    time.sleep(POLL_S)
                if "exit_code" in word:
                    self.wire.say(f"bye/{self.process_info.rank}", {"exit_code": word["exit_code"]})
                    return int(word["exit_code"])
                self._take_part(word, f"{number}/{self.process_info.rank}")
        raise AssertionError("numbers do not end")

    def _take_part(self, word: dict[str, Any], key: str) -> None:
        """Run this program's process of a cell; its end, and what it says, is told to the first."""
        process_info = replace(self.process_info, namespace=word["meeting"])
        member = NearMember(Path(word["folder"]), Path(word["results"]), process_info)
        told, asked = None, False
        try:
            while not member.has_ended:
                wait(member.waitables, 2 * POLL_S)
                member.look()
                if (state := _state(member)) != told:
                    told = state
                    self.wire.say(f"state/{key}", state)
                if not asked and self.wire.hear(f"stop/{key}") is not None:
                    asked = True
                    member.stop()
                if self.wire.hear(f"kill/{key}") is not None:
                    return
                self._attend()
        finally:
            member.kill()

    def _attend(self) -> None:
        """Pass on a wish to stop; raise AbandonedError when the first program is lost."""
        if self.signals and not self.passed_on:
            self.passed_on = True
            self.wire.say("wish", {"signal": self.signals[0]})
        silent_s = self.leader.silent_s()
        bound_s = START_S if not self.leader.has_begun else GONE_S if self.signals else LOST_S
        if silent_s > bound_s:
            raise AbandonedError(f"rank {self.process_info.rank}: no word from rank 0 for {silent_s:.0f} s")


def _state(member: NearMember) -> dict[str, Any]:
    ending = member.ending()
    return {
        "step": ending.step,
        "status": ending.status,
        "error": ending.error,
        "fault": ending.fault,
        "exit_code": ending.exit_code,
        "has_ended": member.has_ended,
    }
