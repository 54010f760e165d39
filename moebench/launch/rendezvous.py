"""Communication between programs started by torchrun or SLURM: messages and heartbeats in a key-value store."""

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

from moebench.launch.cluster_environment import ClusterEnvironment

STARTUP_TIMEOUT_S = 300.0
"""How long the other programs may take to start: the nodes of a cluster do not start at the same moment."""
STORE_TIMEOUT_S = 20.0
"""How long the store may take to answer."""
HEARTBEAT_INTERVAL_S = 0.5
HEARTBEAT_TIMEOUT_S = 15.0
"""A program without a heartbeat for this long counts as lost."""


class RendezvousError(Exception):
    """The other programs of this launch, or the store, cannot be reached."""


class Rendezvous:
    """Client of the store that all programs of a launch share; sends heartbeats until it is closed."""

    def __init__(self, environment: ClusterEnvironment) -> None:
        process_info = environment.process_info
        self.rank = process_info.rank
        self.world_size = process_info.world_size
        address = f"{process_info.store_host}:{process_info.store_port}"
        try:
            store = TCPStore(
                process_info.store_host,
                process_info.store_port,
                is_master=environment.hosts_store and process_info.rank == 0,
                wait_for_workers=False,
                timeout=timedelta(seconds=STARTUP_TIMEOUT_S),
            )
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise RendezvousError(f"rank {self.rank} cannot connect to the store at {address}: {reason}") from error
        store.set_timeout(timedelta(seconds=STORE_TIMEOUT_S))
        self.store = PrefixStore(process_info.namespace, store)
        self._closed = threading.Event()
        self._call_started_at: float | None = None
        self._threads = [
            threading.Thread(target=target, daemon=True) for target in (self._send_heartbeats, self._exit_on_timeout)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, key: str, message: dict[str, Any]) -> None:
        """Store a message under a key."""
        with self._store_call():
            self.store.set(key, json.dumps(message))

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the message under a key, or None if there is none yet."""
        message: dict[str, Any] | None = None
        with self._store_call():
            if self.store.check([key]):
                message = json.loads(self.store.get(key))
        return message

    def heartbeat_count(self, rank: int) -> int:
        """Return the number of heartbeats that a program has sent."""
        count = 0
        with self._store_call():
            count = int(self.store.add(f"heartbeat/{rank}", 0))
        return count

    @contextlib.contextmanager
    def _store_call(self) -> Iterator[None]:
        self._call_started_at = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            raise RendezvousError("the store of this launch has ended") from error
        finally:
            self._call_started_at = None

    def close(self) -> None:
        """Stop the heartbeats."""
        self._closed.set()
        for thread in self._threads:  # a thread inside the store must not outlive the interpreter
            thread.join(timeout=STORE_TIMEOUT_S)

    def _send_heartbeats(self) -> None:
        with contextlib.suppress(RuntimeError):  # calls of the main thread raise the same error
            while not self._closed.is_set():
                self.store.add(f"heartbeat/{self.rank}", 1)
                self._closed.wait(HEARTBEAT_INTERVAL_S)

    def _exit_on_timeout(self) -> None:
        """End this program, and with it its workers, when a store call hangs.

        The store's own timeout does not cover a host that is stopped: the call would block forever.
        """
        while not self._closed.wait(1.0):
            started_at = self._call_started_at
            if started_at is not None and time.monotonic() - started_at > STORE_TIMEOUT_S:
                text = f"error: rank {self.rank}: the store of this launch has not answered for {STORE_TIMEOUT_S:.0f} s"
                print(text, file=sys.stderr, flush=True)
                os._exit(1)


class HeartbeatMonitor:
    """Watches the heartbeats of another program."""

    def __init__(self, rendezvous: Rendezvous, rank: int) -> None:
        self.rendezvous = rendezvous
        self.rank = rank
        self._count = 0
        self._last_at = time.monotonic()

    @property
    def has_started(self) -> bool:
        """Whether the program has sent a heartbeat."""
        return self._count > 0

    def silent_s(self) -> float:
        """Return the seconds since the last heartbeat."""
        count = self.rendezvous.heartbeat_count(self.rank)
        if count != self._count:
            self._count, self._last_at = count, time.monotonic()
        return time.monotonic() - self._last_at
