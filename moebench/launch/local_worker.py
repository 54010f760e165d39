"""One process of a cell as its runner sees it: what it says, whether it lives, how it ended."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver, get_context, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from moebench import interrupts
from moebench.launch.diagnosis import Ending
from moebench.parallel.process_info import ProcessInfo

CONTEXT = get_context("forkserver")
"""Processes are forked from a server that has torch and lightning loaded: only the first waits for the imports."""


class Member(Protocol):
    """A process of a cell, on this machine or another."""

    rank: int
    has_ended: bool
    """Whether there is nothing more to come."""

    @property
    def waitables(self) -> list[Any]:
        """What becomes readable when there is something to look at; may be empty."""

    def look(self) -> dict[str, Any] | None:
        """Take note of what there is to know; return its newest progress, if there is any."""

    def stop(self) -> None:
        """Ask it to save and end."""

    def kill(self) -> None:
        """End it now, stopped ones too."""

    def ending(self) -> Ending:
        """Return how it ended, or that it has not."""


class NearMember:
    """A process that was started here."""

    def __init__(self, folder: Path, results: Path, process_info: ProcessInfo, devices: Sequence[str] = ()) -> None:
        """`devices`: the GPUs of the cell, of which it sees no others; empty: all that there are."""
        ours, theirs = CONTEXT.Pipe()
        self.rank = process_info.rank
        self.pipe: Connection = ours
        self.process = CONTEXT.Process(
            target=_enter,
            args=(str(folder), str(results), process_info, tuple(devices), theirs),
            name=f"rank {process_info.rank}",
            daemon=True,
        )
        self.process.start()
        theirs.close()
        self.has_ended = False
        self.step = 0
        self.heard_at = time.monotonic()
        self.word: dict[str, Any] = {}
        """The last one."""
        self.exit_code: int | None = None

    @property
    def waitables(self) -> list[Any]:
        """Its pipe, and what tells of its end."""
        if self.has_ended:
            return []
        return [self.process.sentinel] if self.pipe.closed else [self.process.sentinel, self.pipe]

    def look(self) -> dict[str, Any] | None:
        """Read the pipe, and see whether the process has ended."""
        ended = not self.process.is_alive()  # first: what is read then is all there was
        news = None
        for message in self._messages():
            self.heard_at = time.monotonic()
            self.step = message.get("step", self.step)
            if message.pop("kind") == "progress":
                news = message
            else:
                self.word = message
        if ended and not self.has_ended:
            self.has_ended = True
            self.exit_code = self.process.exitcode
            self.pipe.close()
        return news

    def _messages(self) -> Iterator[dict[str, Any]]:
        try:
            while not self.pipe.closed and self.pipe.poll():
                yield self.pipe.recv()
        except (EOFError, OSError):
            self.pipe.close()

    def stop(self) -> None:
        """Ask it to save and end."""
        with contextlib.suppress(OSError):
            self.pipe.send("stop")

    def kill(self) -> None:
        """Kill it and wait for its end; what killed it is not its own doing and does not count."""
        if not self.has_ended:
            self.process.kill()
            self.process.join(timeout=5)
            self.has_ended = True

    def ending(self) -> Ending:
        """Return how it ended."""
        known = {key: self.word[key] for key in ("status", "error", "fault", "metrics") if key in self.word}
        return Ending(
            rank=self.rank,
            step=self.step,
            exit_code=self.exit_code,
            silent_s=time.monotonic() - self.heard_at,
            **known,
        )


def start_server() -> None:
    """Start the process that the others are forked from, deaf to signals from its first moment on.

    Ctrl-C reaches the whole group, and would otherwise interrupt its imports with a traceback.
    """
    CONTEXT.set_forkserver_preload(["moebench.launch.fork_source"])
    resource_tracker.ensure_running()  # when it is started it lets signals through again: so it comes first
    # Held back, and not ignored: a program inherits either, but what comes meanwhile is for the runner to hear.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def signals_noted(note: Callable[[int], None]) -> Iterator[None]:
    """Call `note` with the number of each Ctrl-C and SIGTERM instead of ending."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda got, frame: note(got)) for number in numbers}
    for number in interrupts.heard:
        note(number)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _enter(path: str, results: str, process_info: ProcessInfo, devices: tuple[str, ...], pipe: Connection) -> None:
    """Import the worker in its own process: the runner stays light."""
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices)  # read when CUDA is used for the first time: not yet
    from moebench.launch.worker import run_cell

    run_cell(path, results, process_info, pipe)
