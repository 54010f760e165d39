"""A process of a cell: it trains, reports through a pipe, and ends when its runner does."""

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import threading
import traceback
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import torch
from filelock import FileLock, Timeout
from torch.distributed.checkpoint.api import CheckpointException

from moebench.config import resolve, to_yaml
from moebench.launch.failure import explain, fault_of
from moebench.parallel.mesh import open_mesh
from moebench.parallel.process_info import ProcessInfo
from moebench.registry import load_plugin
from moebench.runs.environment import collect_environment
from moebench.runs.folder import RunFolder, write_atomically, write_json
from moebench.runs.recorder import RunRecorder
from moebench.runs.result import RunResult
from moebench.schema import CellConfig
from moebench.training.callback import RunContext
from moebench.training.model import prepare_task
from moebench.training.train import select_device, train_cell

PROGRESS_EVERY_S = 0.2
PR_SET_PDEATHSIG = 1


@dataclass
class RunnerLink:
    """The pipe to the runner: progress goes up, a stop comes down, and its end means that the runner is gone."""

    pipe: Connection
    stop: threading.Event = field(default_factory=threading.Event)
    step: int = 0
    """The last one finished."""
    _news: dict[str, Any] | None = None
    _sending: threading.Lock = field(default_factory=threading.Lock)

    def watch(self) -> None:
        """Carry words in a thread, a few times a second; leave at once, without a trace, when the runner has died."""

        def carry() -> None:
            try:
                while True:
                    if self.pipe.poll(PROGRESS_EVERY_S):
                        self.pipe.recv()
                        self.stop.set()
                    self._send_news()
            except (EOFError, OSError):
                os._exit(1)  # what is lost lies behind the last checkpoint and will be done again

        threading.Thread(target=carry, daemon=True).start()

    def progress(self, message: dict[str, Any]) -> None:
        """Note progress: it costs the step nothing, and the thread sends it."""
        self.step = message["step"]
        self._news = {"kind": "progress", **message}

    def end(self, word: dict[str, Any]) -> None:
        """Send the last word; a runner that is gone is dealt with by `watch`."""
        with self._sending, contextlib.suppress(OSError):
            self.pipe.send({"kind": "end", "step": self.step, **word})

    def _send_news(self) -> None:
        with self._sending:
            news, self._news = self._news, None
            if news is not None:
                self.pipe.send(news)


def run_cell(path: str, results: str, process_info: ProcessInfo, pipe: Connection) -> NoReturn:
    """Train the cell whose folder is `path`, as one of its processes: the entry point of a worker."""
    # Both reach the whole group, from a terminal or a batch system; the runner decides. Blocked, not ignored: lightning
    # would install a handler that talks to the other processes in the midst of whatever they are saying.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    die_with_parent()
    folder = RunFolder(Path(path))
    _redirect_output(folder.log_of(process_info.rank))
    link = RunnerLink(pipe)
    link.watch()
    code = 0
    try:
        with FileLock(folder.path / ".lock", timeout=0) if process_info.rank == 0 else contextlib.nullcontext():
            # Done by another runner since ours looked: not again.
            found = process_info.rank == 0 and folder.state() == "done"
            link.end({"status": "found", "error": None} if found else _train(folder, Path(results), process_info, link))
    except Timeout:
        link.end({"status": "busy", "error": "another process is training this cell"})
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        code = 1
        with contextlib.suppress(OSError):
            traceback.print_exc()
    # Not by returning: threads of a broken group would be waited for.
    with contextlib.suppress(OSError):  # a full disk has no room for the log either
        sys.stdout.flush()
    os._exit(code)


def _train(folder: RunFolder, results: Path, process_info: ProcessInfo, link: RunnerLink) -> dict[str, Any]:
    """Return the last word: how it ended and why; the runner, who hears all processes, writes what failed."""
    cell = json.loads(folder.cell.read_text())
    if process_info.rank == 0:
        folder.result.unlink(missing_ok=True)
    try:
        for plugin in cell["plugins"]:
            load_plugin(plugin)
        config = resolve(cell["config"])
        result = _train_logged(config, cell, folder, results, process_info, link)
        if result is not None and process_info.rank == 0:
            write_json(folder.result, result.to_dict())
    except (Exception, CheckpointException) as error:
        with contextlib.suppress(OSError):  # a full disk: the runner still gets the reason
            traceback.print_exc()
        return {"status": "failed", "error": explain(error), "fault": fault_of(error)}
    if result is None:
        return {"status": "stopped", "error": None}
    return {"status": "done", "error": None, "metrics": result.metrics}


def _train_logged(
    config: CellConfig,
    cell: dict[str, Any],
    folder: RunFolder,
    results: Path,
    process_info: ProcessInfo,
    link: RunnerLink,
) -> RunResult | None:
    torch.set_num_threads(config.train.threads)
    if process_info.rank == 0:
        write_json(folder.environment, collect_environment(config.train.threads))
        write_atomically(folder.path / "config.yaml", to_yaml(config))
    task = prepare_task(config, results)
    if process_info.has_group and process_info.num_nodes == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback())  # whatever this machine's name leads to
    device = select_device(config.train, process_info)
    with (
        RunRecorder(folder if process_info.rank == 0 else None) as recorder,
        open_mesh(config.parallel, process_info, device) as mesh,
    ):
        context = RunContext(
            recorder=recorder,
            checkpoints=folder.checkpoints,
            report_progress=link.progress,
            should_stop=link.stop.is_set,
        )
        return train_cell(config, task, context, cell_id=cell["id"], arm=cell["arm"], mesh=mesh)


def _loopback() -> str:
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")


def die_with_parent() -> None:
    """Have Linux kill this process when the one that started it ends, however that happens.

    The runner starts the fork server, and that the workers: all go with the runner. `watch` sees its end as well, but
    not in a process that is stopped or hangs in C, and the fork server waits for all that it has forked.
    """
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended just before
            os._exit(1)


def _redirect_output(log: Path) -> None:
    """Send everything that this process prints, C libraries included, to the run's log."""
    handle = log.open("a", buffering=1, encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(handle.fileno(), 1)
    os.dup2(handle.fileno(), 2)
    sys.stdout = sys.stderr = handle
