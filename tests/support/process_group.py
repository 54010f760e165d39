"""Processes that join a mesh and run a function of a test; their results or errors are collected."""

import contextlib
import os
import pickle
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from support.separate_device import DEVICE, separate_device
from torch.distributed import TCPStore

from moebench.config import merge_settings
from moebench.parallel.mesh import SINGLE_PROCESS_MESH, Mesh, open_mesh
from moebench.parallel.process_info import ProcessInfo
from moebench.schema import ParallelConfig

LIMIT_S = 280
"""Seconds without a result after which the processes are killed."""

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["support.process_group_imports"])

Job = Callable[..., Any]
"""(mesh, *arguments) -> anything that can be pickled."""


class ProcessGroupError(Exception):
    """Errors of the processes that failed."""


@dataclass(frozen=True)
class Shape:
    """A mesh: data × expert processes."""

    data: int = 1
    expert: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    has_group: bool = False
    """Whether a single process joins a process group of size 1."""
    is_separate: bool = False
    """Whether the processes use a simulated device (see `separate_device`)."""

    def __str__(self) -> str:
        return f"dp{self.data}ep{self.expert}"

    @property
    def size(self) -> int:
        return self.data * self.expert

    def over(self, overrides: dict[str, Any]) -> dict[str, Any]:
        """Return a cell's overrides with the sizes of this mesh."""
        return merge_settings(overrides, {"parallel": {"data": self.data, "expert": self.expert, **self.options}})

    def run(self, job: Job, *arguments: Any) -> list[Any]:
        """Run the job on each rank and return the results by rank."""
        if self.size == 1 and not self.has_group:
            with separate_device() if self.is_separate else contextlib.nullcontext():
                return [job(Mesh(device=DEVICE) if self.is_separate else SINGLE_PROCESS_MESH, *arguments)]
        config = ParallelConfig(data=self.data, expert=self.expert, **{"timeout_s": 30.0, **self.options})
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        process_infos = [
            ProcessInfo(
                rank=rank,
                world_size=self.size,
                local_rank=rank,
                local_world_size=self.size,
                store_port=store.port,
                namespace="test",
            )
            for rank in range(self.size)
        ]
        pipes, processes = [], []
        for process_info in process_infos:
            ours, theirs = CONTEXT.Pipe()
            member = (theirs, config, process_info, self.is_separate, job, arguments)
            process = CONTEXT.Process(target=_member, args=member, daemon=True)
            with _test_modules_found():
                process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return _collect(pipes)
        finally:
            for process in processes:
                process.kill()
                process.join()


SHAPES = [Shape(2, 1), Shape(1, 2), Shape(2, 2), Shape(1, 4)]
ALONE = Shape()


@contextlib.contextmanager
def _test_modules_found() -> Iterator[None]:
    """Set the path on which the fork server, which the first process starts, finds its preloaded module."""
    previous = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), previous]))
    try:
        yield
    finally:
        if previous is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = previous


def _collect(pipes: list[Connection]) -> list[Any]:
    results: dict[int, tuple[str, Any]] = {}
    while len(results) < len(pipes):
        ready = wait([pipe for rank, pipe in enumerate(pipes) if rank not in results], LIMIT_S)
        if not ready:
            raise ProcessGroupError(
                f"ranks {sorted(set(range(len(pipes))) - set(results))} sent no result in {LIMIT_S} s"
            )
        for rank, pipe in enumerate(pipes):
            if pipe in ready and rank not in results:
                try:
                    results[rank] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    results[rank] = ("error", "ended without a result")
    errors = [f"rank {rank}: {value}" for rank, (kind, value) in sorted(results.items()) if kind == "error"]
    if errors:
        raise ProcessGroupError("\n".join(errors))
    return [results[rank][1] for rank in range(len(pipes))]


def _member(
    pipe: Connection,
    config: ParallelConfig,
    process_info: ProcessInfo,
    is_separate: bool,
    job: Job,
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    device = DEVICE if is_separate else torch.device("cpu")
    try:
        with (
            separate_device() if is_separate else contextlib.nullcontext(),
            open_mesh(config, process_info, device) as mesh,
        ):
            _send(pipe, "value", job(mesh, *arguments))
    except BaseException:
        _send(pipe, "error", traceback.format_exc())
    pipe.close()
    os._exit(0)  # without waiting for threads of a broken process group


def _send(pipe: Connection, kind: str, value: Any) -> None:
    pipe.send_bytes(pickle.dumps((kind, value)))  # by value: shared memory of tensors would vanish with the process


__all__ = ["ALONE", "LIMIT_S", "SHAPES", "Mesh", "ProcessGroupError", "Shape"]
