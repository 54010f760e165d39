"""A process of a cell as its runner sees it: its messages, whether it is alive, how it ended."""

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing import active_children
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import psutil
from typing_extensions import override

from moebench.launch.descendants import kill_descendants, kill_processes, list_descendants
from moebench.launch.diagnosis import ExitReport
from moebench.launch.failure import describe_exception
from moebench.launch.fork_server import CONTEXT, end_fork_server, resume_fork_server, start_fork_server
from moebench.parallel.process_info import ProcessInfo
from moebench.runs.result import Fault

START_WAIT_S = 2.0
"""How long the start of a process may block the runner: a fork takes milliseconds, the first one waits for imports."""
RESUME_INTERVAL_S = 0.5
KILL_WAIT_S = 1.0


class Worker(Protocol):
    """A process of a cell, on this machine or another."""

    rank: int
    has_ended: bool
    """Whether all messages have arrived."""
    notes: Sequence[str] = ()
    """Lines for the user that the process has sent."""
    last_message_at: float
    """Time of its newest message, or of its start, by `time.monotonic`."""
    is_saving: bool
    """Whether it has begun to write a checkpoint since its last step."""

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

    def describe_halt(self) -> str:
        """Return why the process cannot continue, such as a stop signal; an empty string if nothing is known."""


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
        self.has_ended = self.is_saving = False
        self.step = 0
        self.last_message_at = time.monotonic()
        self.final_message: dict[str, Any] = {}
        self.exit_code: int | None = None
        self._is_killed = False
        self.server_pid = 0
        self._start_error: BaseException | None = None
        self._server_checked_at = time.monotonic()
        start_fork_server()  # in the main thread: the server ends with the thread that has started it
        # In another thread, because a server that does not answer must not block the runner.
        self._starter = threading.Thread(target=self._start, args=(worker_pipe,), daemon=True)
        self._starter.start()
        self._starter.join(START_WAIT_S)
        if self._start_error is not None:
            raise self._start_error

    def _start(self, worker_pipe: Connection) -> None:
        try:
            self.process.start()
            self.server_pid = _parent_of(self.process.pid)
            if self._is_killed:
                self.process.kill()
        except EOFError:  # the command-line library takes it for Ctrl-D, and would end the run without a word
            self._start_error = ChildProcessError("the process that workers are forked from has ended")
        except BaseException as error:
            self._start_error = error
        finally:
            worker_pipe.close()

    @property
    @override
    def waitables(self) -> list[Any]:
        if self.has_ended or self._starter.is_alive():
            return []
        return [self.process.sentinel] if self.pipe.closed else [self.process.sentinel, self.pipe]

    @override
    def poll(self) -> dict[str, Any] | None:
        if self._starter.is_alive():
            self._resume_server()
            return None
        if self._start_error is not None:
            self._end_without_process(self._start_error)
            return None
        is_alive = self.process.is_alive()  # first, so that the pipe of an ended process is read to its end
        progress = None
        for message in self._receive():
            self.last_message_at = time.monotonic()
            self.step = message.get("step", self.step)
            kind = message.pop("kind")
            self.is_saving = kind == "saving"
            if kind == "progress":
                progress = message
            elif kind == "note":
                self.notes = (*self.notes, message["text"])
            elif kind == "exit":
                self.final_message = message
        if not is_alive and not self.has_ended:
            self.has_ended = True
            self.exit_code = self.process.exitcode
            self.pipe.close()
            if not self.final_message:  # a crash: what it had started is now below the fork server
                keep = {child.pid for child in active_children() if child.pid is not None}
                kill_descendants(self.server_pid, keep)
        return progress

    def _resume_server(self) -> None:
        if time.monotonic() - self._server_checked_at > RESUME_INTERVAL_S:
            self._server_checked_at = time.monotonic()
            resume_fork_server()

    def _end_without_process(self, error: BaseException) -> None:
        self.has_ended = True
        self.final_message = {"status": "failed", "error": describe_exception(error), "fault": Fault.PROCESS_ERROR}
        self.pipe.close()

    def _receive(self) -> Iterator[dict[str, Any]]:
        try:
            while not self.pipe.closed and self.pipe.poll():
                yield self.pipe.recv()
        except Exception:  # it has ended, or something else has written to the pipe
            self.pipe.close()

    @override
    def request_stop(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send("stop")

    @override
    def kill(self) -> None:
        if self.has_ended:
            return
        self.has_ended = self._is_killed = True  # the exit code stays None: the process did not fail by itself
        self._starter.join(KILL_WAIT_S)
        if self._starter.is_alive():
            end_fork_server()
        elif self._start_error is None:
            descendants = list_descendants(self.process.pid or 0)
            self.process.kill()
            resume_fork_server()  # which reports the end of the process
            self.process.join(timeout=5)
            kill_processes(descendants)

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

    @override
    def describe_halt(self) -> str:
        if self._starter.is_alive():
            return "has not been started: the fork server does not answer"
        try:
            is_stopped = psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED
        except psutil.Error:
            return ""
        return "is stopped by a signal (SIGSTOP)" if is_stopped else ""


def _parent_of(pid: int | None) -> int:
    """Return the id of the fork server, the parent of a worker; 0 if the worker has ended already."""
    try:
        return psutil.Process(pid).ppid()
    except psutil.Error:
        return 0


def _start_worker(
    path: str, results: str, process_info: ProcessInfo, devices: tuple[str, ...], pipe: Connection
) -> None:
    """Import the worker in its own process, so that the runner does not import the trainer."""
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices)  # CUDA reads it on first use, which is later
    from moebench.launch.worker_process import run_worker

    run_worker(path, results, process_info, pipe)
