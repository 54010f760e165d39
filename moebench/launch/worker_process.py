"""Entry point of a worker: a process that trains a cell, reports to the runner and ends with it."""

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock, Timeout
from torch.distributed.checkpoint.api import CheckpointException

from moebench.allocator import keep_freed_memory
from moebench.file_access import open_to_write
from moebench.interrupts import STOP_SIGNALS
from moebench.launch.descendants import adopt_orphans, kill_descendants
from moebench.launch.error_report import classify_error, describe_cell_error
from moebench.launch.folder_training import TrainingReports, train_from_folder
from moebench.launch.parent_death import exit_with_parent
from moebench.parallel.process_info import ProcessInfo
from moebench.plugin_errors import find_plugin_line
from moebench.printable import print_text
from moebench.runs.folder import RunFolder
from moebench.runs.result import RunResult

PROGRESS_INTERVAL_S = 0.2
ACTIVITY_INTERVAL_S = 1.0
"""Seconds between messages that say nothing but that batches are being processed."""


@dataclass
class RunnerConnection:
    """The pipe to the runner: it carries progress and the exit report to it, and a stop request from it."""

    pipe: Connection
    stop_requested: threading.Event = field(default_factory=threading.Event)
    step: int = 0
    """The last step completed."""
    _progress: dict[str, Any] | None = None
    """The newest message that has not been sent."""
    _phase: str | None = None
    """What was reported by `report_activity` since the last message."""
    _sent_at: float = 0.0
    _send_lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self) -> None:
        """Start the thread that sends and receives; it ends this process at once when the runner has ended."""

        def relay() -> None:
            try:
                while True:
                    if self.pipe.poll(PROGRESS_INTERVAL_S):
                        self.pipe.recv()
                        self.stop_requested.set()
                    self._send_progress()
            except (EOFError, OSError):
                os._exit(1)  # steps after the last checkpoint are lost, and repeated by the next run

        threading.Thread(target=relay, daemon=True).start()

    def report_progress(self, message: dict[str, Any]) -> None:
        """Store a message for the thread to send, so that the training step does not wait for the pipe."""
        self.step = message["step"]
        self._progress, self._phase = {"kind": "progress", **message}, None

    def report_activity(self, phase: str) -> None:
        """Note that a batch was processed (`active`), or that a checkpoint is about to be written (`saving`)."""
        self._phase = phase

    def report_note(self, text: str) -> None:
        """Send a line for the user, and write it to the log."""
        print_text(text)
        with self._send_lock, contextlib.suppress(OSError):
            self.pipe.send({"kind": "note", "text": text})

    def report_exit(self, report: dict[str, Any]) -> None:
        """Send the last message; if the runner has ended, the thread of `start` ends this process."""
        with self._send_lock, contextlib.suppress(OSError):
            self.pipe.send({"kind": "exit", "step": self.step, **report})

    def _send_progress(self) -> None:
        with self._send_lock:
            message, self._progress = self._progress, None
            if message is not None:
                self.pipe.send(message)
                self._sent_at = time.monotonic()
            is_due = self._phase == "saving" or time.monotonic() - self._sent_at > ACTIVITY_INTERVAL_S
            if self._phase is not None and is_due:
                phase, self._phase = self._phase, None
                self.pipe.send({"kind": phase})
                self._sent_at = time.monotonic()


def run_worker(path: str, results: str, process_info: ProcessInfo, pipe: Connection) -> NoReturn:
    """Train the cell whose folder is `path` as one of its processes, then exit."""
    # A terminal or batch system signals the whole process group, and the runner decides. Blocked rather than ignored:
    # lightning would install a handler that communicates with the other processes in the middle of a collective.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    exit_with_parent()
    adopt_orphans()
    folder = RunFolder(Path(path))
    _redirect_output(folder.log_for_rank(process_info.rank))
    connection = RunnerConnection(pipe)
    connection.start()
    code = 0
    try:
        with FileLock(folder.lock, timeout=0) if process_info.rank == 0 else contextlib.nullcontext():
            # Another runner may have completed the cell since ours read its state.
            is_done = process_info.rank == 0 and folder.state() == "done"
            report = {"status": "skipped"} if is_done else _train(folder, Path(results), process_info, connection)
            connection.report_exit(report)
    except Timeout:
        connection.report_exit({"status": "busy", "error": "another process is training this cell"})
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        code = 1
        with contextlib.suppress(OSError):
            traceback.print_exc()
    with contextlib.suppress(OSError):  # a full disk has no room for the log either
        sys.stdout.flush()
    kill_descendants(os.getpid())
    os._exit(code)  # a normal exit would wait for the threads of a broken process group


def _train(folder: RunFolder, results: Path, process_info: ProcessInfo, connection: RunnerConnection) -> dict[str, Any]:
    """Train, and return the exit report; the runner, which has the reports of all processes, writes a failed result."""
    keep_freed_memory()
    try:
        result = train_from_folder(
            folder,
            results,
            process_info,
            TrainingReports(
                progress=connection.report_progress,
                should_stop=connection.stop_requested.is_set,
                note=connection.report_note,
                activity=connection.report_activity,
            ),
        )
    except (Exception, SystemExit, CheckpointException) as error:
        if isinstance(error, SystemExit) and find_plugin_line(error) is None:
            raise
        with contextlib.suppress(OSError):  # a full disk: the runner still gets the reason
            traceback.print_exc()
        return {"status": "failed", "error": describe_cell_error(error, folder), "fault": classify_error(error)}
    if result is None:
        return {"status": "stopped"}
    return {"status": "done", "metrics": list_shown_metrics(result)}


def list_shown_metrics(result: RunResult) -> dict[str, float]:
    """Return the final metrics for a display: on the test split, and with the prefix `validation/` on that one."""
    return result.metrics | {f"validation/{name}": value for name, value in result.validation.items()}


def _redirect_output(log: Path) -> None:
    """Send everything that this process prints, C libraries included, to the log of the run."""
    try:
        handle = os.fdopen(open_to_write(log), "a", buffering=1, encoding="utf-8", errors="replace")
    except OSError:  # such as a folder of that name, or a link
        handle = open(os.devnull, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - for the life of the process
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # it is None where the runner has no such stream
            stream.flush()
    os.dup2(handle.fileno(), 1)
    os.dup2(handle.fileno(), 2)
    sys.stdout = sys.stderr = handle
