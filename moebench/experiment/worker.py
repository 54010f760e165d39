"""The process of one cell: it trains, reports through a pipe, and ends when its runner does."""

import contextlib
import errno
import json
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from moebench.config import resolve, to_yaml
from moebench.errors import UsageError
from moebench.experiment.failure import disk_reason, failed_result
from moebench.registry import load_plugin
from moebench.schema import CellConfig
from moebench.tracking.journal import read_journal
from moebench.tracking.recorder import RunRecorder
from moebench.training.callback import Hooks
from moebench.training.environment import environment
from moebench.training.model import prepare_task
from moebench.training.module import NonFiniteError
from moebench.training.result import RunResult
from moebench.training.run_folder import RunFolder, write_atomically, write_json
from moebench.training.train import train_cell

PROGRESS_EVERY_S = 0.2


@dataclass
class RunnerLink:
    """The pipe to the runner: progress goes up, a stop comes down, and its end means that the runner is gone."""

    pipe: Connection
    stop: threading.Event = field(default_factory=threading.Event)
    _sent_at: float = 0.0

    def watch(self) -> None:
        """Wait for the runner's word in a thread; leave at once, without a trace, when the runner has died."""

        def wait() -> None:
            try:
                while True:
                    self.pipe.recv()
                    self.stop.set()
            except (EOFError, OSError):
                os._exit(1)  # what is lost lies behind the last checkpoint and will be done again

        threading.Thread(target=wait, daemon=True).start()

    def progress(self, message: dict[str, Any]) -> None:
        """Send progress, a few times a second."""
        now = time.monotonic()
        if now - self._sent_at >= PROGRESS_EVERY_S:
            self._sent_at = now
            self.send({"kind": "progress", **message})

    def send(self, message: dict[str, Any]) -> None:
        """Send one message; a runner that is gone is dealt with by `watch`."""
        with contextlib.suppress(OSError):
            self.pipe.send(message)


def run_cell(path: str, results: str, pipe: Connection) -> None:
    """Train the cell whose folder is `path`: the entry point of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the runner decides
    folder = RunFolder(Path(path))
    _redirect_output(folder.log)
    link = RunnerLink(pipe)
    link.watch()
    try:
        with FileLock(folder.path / ".lock", timeout=0):
            # Done by another runner since ours looked: not again.
            found = folder.state() == "done"
            end = {"status": "found", "error": None} if found else _train(folder, Path(results), link)
            link.send({"kind": "end", **end})
    except Timeout:
        link.send({"kind": "end", "status": "busy", "error": "another process is training this cell"})
    finally:
        with contextlib.suppress(OSError):  # a full disk has no room for the log either
            sys.stdout.flush()


def _train(folder: RunFolder, results: Path, link: RunnerLink) -> dict[str, Any]:
    """Return the status and the reason of a failure, after writing the result."""
    cell = json.loads(folder.cell.read_text())
    folder.result.unlink(missing_ok=True)
    started = time.time()
    try:
        for plugin in cell["plugins"]:
            load_plugin(plugin)
        config = resolve(cell["config"], str(folder.cell))
        result = _train_logged(config, cell, folder, results, link)
        if result is not None:
            write_json(folder.result, result.to_dict())
    except Exception as error:
        reason = explain(error)
        with contextlib.suppress(OSError):  # a full disk: the runner still gets the reason
            traceback.print_exc()
            last = last_step(folder.journal)
            failed = failed_result(cell, reason, step=last, total_s=time.time() - started)
            write_json(folder.result, failed.to_dict())
        return {"status": "failed", "error": reason}
    if result is None:
        return {"status": "stopped", "error": None}
    return {"status": "done", "error": None, "metrics": result.metrics}


def _train_logged(
    config: CellConfig, cell: dict[str, Any], folder: RunFolder, results: Path, link: RunnerLink
) -> RunResult | None:
    torch.set_num_threads(config.train.threads)
    write_json(folder.environment, environment(config.train.threads))
    write_atomically(folder.path / "config.yaml", to_yaml(config))
    task = prepare_task(config, results)
    with RunRecorder(folder.journal, folder.loads) as recorder:
        hooks = Hooks(
            recorder=recorder,
            progress=link.progress,
            should_stop=link.stop.is_set,
        )
        return train_cell(config, task, folder.checkpoints, hooks, cell_id=cell["id"], arm=cell["arm"])


def explain(error: Exception) -> str:
    """Return the reason of a failure in one line."""
    if isinstance(error, NonFiniteError | UsageError):
        return str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return disk_reason(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return f"out of memory: {' '.join(str(error).split())[:200]}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def last_step(journal: Path) -> int:
    """Return the last step that a journal knows of, 0 for none."""
    points, _ = read_journal(journal)
    return max((point.step for point in points), default=0)


def _redirect_output(log: Path) -> None:
    """Send everything that this process prints, C libraries included, to the run's log."""
    handle = log.open("a", buffering=1, encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(handle.fileno(), 1)
    os.dup2(handle.fileno(), 2)
    sys.stdout = sys.stderr = handle
