"""A process of a cell as its runner sees it: its messages, whether it is alive, how it ended."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Sequence
from multiprocessing import active_children, forkserver, get_context, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import psutil
from typing_extensions import override

from moebench.launch.descendants import kill_descendants, kill_processes, list_descendants
from moebench.launch.diagnosis import ExitReport
from moebench.parallel.process_info import ProcessInfo

CONTEXT = get_context("forkserver")
"""Workers are forked from a server that has imported torch and lightning: only the first one waits for the imports."""


class Worker(Protocol):
    """A process of a cell, on this machine or another."""

    rank: int
    has_ended: bool
    """Whether no more messages will come."""
    notes: Sequence[str] = ()
    """Lines for the user that the process has sent."""

    @property
    def waitables(self) -> list[Any]:
        """Objects for `multiprocessing.connection.wait` that become ready when `poll` has something to read."""

    def poll(self) -> dict[str, Any] | None:
        """Read all messages; return the newest progress, or None."""

    def request_stop(self) -> None:
        """Ask the process to save a checkpoint and end."""

    def kill(self) -> None:
        """Kill the process, even if it is stopped."""

    def exit_report(self) -> ExitReport:
        """Return how the process ended, or that it has not."""


class LocalWorker(Worker):
    """A process on this machine."""

    def __init__(self, folder: Path, results: Path, process_info: ProcessInfo, devices: Sequence[str] = ()) -> None:
        """Start the process; `devices` are the only GPUs that it sees, empty: all."""
        self.pipe: Connection
        self.pipe, worker_pipe = CONTEXT.Pipe()
        self.rank = process_info.rank
        self.process = CONTEXT.Process(
            target=_start_worker,
            args=(str(folder), str(results), process_info, tuple(devices), worker_pipe),
            name=f"rank {process_info.rank}",
            daemon=True,
        )
        self.process.start()
        worker_pipe.close()
        self.server_pid = _parent_of(self.process.pid)
        self.has_ended = False
        self.step = 0
        self.last_message_at = time.monotonic()
        self.final_message: dict[str, Any] = {}
        self.exit_code: int | None = None

    @property
    @override
    def waitables(self) -> list[Any]:
        if self.has_ended:
            return []
        return [self.process.sentinel] if self.pipe.closed else [self.process.sentinel, self.pipe]

    @override
    def poll(self) -> dict[str, Any] | None:
        is_alive = self.process.is_alive()  # first, so that the pipe of an ended process is read to its end
        progress = None
        for message in self._receive():
            self.last_message_at = time.monotonic()
            self.step = message.get("step", self.step)
            kind = message.pop("kind")
            if kind == "progress":
                progress = message
            elif kind == "note":
                self.notes = (*self.notes, message["text"])
            else:
                self.final_message = message
        if not is_alive and not self.has_ended:
            self.has_ended = True
            self.exit_code = self.process.exitcode
            self.pipe.close()
            if not self.final_message:  # a crash: what it had started is now below the fork server
                keep = {child.pid for child in active_children() if child.pid is not None}
                kill_descendants(self.server_pid, keep)
        return progress

    def _receive(self) -> Iterator[dict[str, Any]]:
        try:
            while not self.pipe.closed and self.pipe.poll():
                yield self.pipe.recv()
        except (EOFError, OSError):
            self.pipe.close()

    @override
    def request_stop(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send("stop")

    @override
    def kill(self) -> None:
        if not self.has_ended:
            descendants = list_descendants(self.process.pid or 0)
            self.process.kill()
            self.process.join(timeout=5)
            kill_processes(descendants)
            self.has_ended = True  # the exit code stays None: the process did not fail by itself

    @override
    def exit_report(self) -> ExitReport:
        message = self.final_message
        return ExitReport(
            rank=self.rank,
            step=self.step,
            exit_code=self.exit_code,
            silent_s=time.monotonic() - self.last_message_at,
            **{key: message[key] for key in ("status", "error", "fault", "metrics") if key in message},
        )


def _parent_of(pid: int | None) -> int:
    """Return the id of the fork server, the parent of a worker; 0 if the worker has ended already."""
    try:
        return psutil.Process(pid).ppid()
    except psutil.Error:
        return 0


def start_fork_server() -> None:
    """Start the process that workers are forked from, with SIGINT and SIGTERM blocked from the start.

    Ctrl-C reaches the whole process group, and would interrupt the server's imports with a traceback.
    """
    CONTEXT.set_forkserver_preload(["moebench.launch.forkserver_preload"])
    resource_tracker.ensure_running()  # starting it unblocks signals, so it comes first
    # Blocked rather than ignored: child processes inherit both, but a blocked signal is delivered to the runner later.
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)


def _start_worker(
    path: str, results: str, process_info: ProcessInfo, devices: tuple[str, ...], pipe: Connection
) -> None:
    """Import the worker in its own process, so that the runner does not import the trainer."""
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices)  # CUDA reads it on first use, which is later
    from moebench.launch.worker_process import run_worker

    run_worker(path, results, process_info, pipe)
