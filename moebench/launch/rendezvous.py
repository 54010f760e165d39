"""What the programs that torchrun or SLURM has started tell each other: words and heartbeats in a key-value store."""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import PrefixStore, TCPStore

from moebench.launch.launcher import Given

START_S = 300.0
"""How long the others may take to start: nodes of a cluster do not begin at the same moment."""
ANSWER_S = 20.0
"""How long the store may take to answer."""
BEAT_S = 0.5
"""Seconds between heartbeats."""
LOST_S = 15.0
"""Without a heartbeat for so long a program is lost."""


class AbandonedError(Exception):
    """The other programs of this start, or the store where they met, are gone."""


class Wire:
    """One program's end of the line; it beats like a heart from the start to `close`."""

    def __init__(self, given: Given) -> None:
        process_info = given.process_info
        self.rank = process_info.rank
        self.world_size = process_info.world_size
        where = f"{process_info.store_host}:{process_info.store_port}"
        try:
            store = TCPStore(
                process_info.store_host,
                process_info.store_port,
                is_master=given.hosts_store and process_info.rank == 0,
                wait_for_workers=False,
                timeout=timedelta(seconds=START_S),
            )
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise AbandonedError(f"rank {process_info.rank} cannot meet the others at {where}: {reason}") from error
        store.set_timeout(timedelta(seconds=ANSWER_S))
        self.store = PrefixStore(process_info.namespace, store)
        self._closed = threading.Event()
        self._asked_at: float | None = None
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._guard)]
        for thread in self._threads:
            thread.start()

    def say(self, key: str, word: dict[str, Any]) -> None:
        """Write a word for whoever reads this key."""
        with self._asking():
            self.store.set(key, json.dumps(word))

    def hear(self, key: str) -> dict[str, Any] | None:
        """Return the word at a key, None when there is none yet."""
        with self._asking():
            word: dict[str, Any] | None = json.loads(self.store.get(key)) if self.store.check([key]) else None
        return word

    def beats(self, rank: int) -> int:
        """Return how often a program's heart has beaten."""
        with self._asking():
            count = int(self.store.add(f"beat/{rank}", 0))
        return count

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        self._asked_at = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            raise AbandonedError("the store where the processes met is gone") from error
        finally:
            self._asked_at = None

    def close(self) -> None:
        """Stop beating."""
        self._closed.set()
        for thread in self._threads:  # one inside the store must not meet the end of the interpreter
            thread.join(timeout=ANSWER_S)

    def _beat(self) -> None:
        with contextlib.suppress(RuntimeError):  # the program's own calls will say so
            while not self._closed.is_set():
                self.store.add(f"beat/{self.rank}", 1)
                self._closed.wait(BEAT_S)

    def _guard(self) -> None:
        """End this program when the store, whose host may be stopped, leaves a question open: it would wait forever.

        What it has started ends with it.
        """
        while not self._closed.wait(1.0):
            asked_at = self._asked_at
            if asked_at is not None and time.monotonic() - asked_at > ANSWER_S:
                text = (
                    f"error: rank {self.rank}: the store where the processes met has not answered for {ANSWER_S:.0f} s"
                )
                print(text, file=sys.stderr, flush=True)
                os._exit(1)


class Pulse:
    """Feels whether another program lives."""

    def __init__(self, wire: Wire, rank: int) -> None:
        self.wire = wire
        self.rank = rank
        self._beats = 0
        self._felt_at = time.monotonic()

    @property
    def has_begun(self) -> bool:
        """Whether there was ever a heartbeat."""
        return self._beats > 0

    def silent_s(self) -> float:
        """Return the seconds since the last heartbeat."""
        beats = self.wire.beats(self.rank)
        if beats != self._beats:
            self._beats, self._felt_at = beats, time.monotonic()
        return time.monotonic() - self._felt_at
