"""Real processes that join a mesh and run a function of a test; each result, or each error, comes back."""

import contextlib
import os
import pickle
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from support.separate_device import DEVICE, separate_device
from torch.distributed import TCPStore

from moebench.config import merge_settings
from moebench.parallel.mesh import SINGLE_PROCESS_MESH, Mesh, open_mesh
from moebench.parallel.process_info import ProcessInfo
from moebench.schema import ParallelConfig

LIMIT_S = 280
"""How long a team may take; whoever is still there then is killed."""

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["moebench.training.train"])

Job = Callable[..., Any]
"""(mesh, *arguments) -> anything that can be sent through a pipe."""


class TeamError(Exception):
    """What some processes said when they failed."""


@dataclass(frozen=True)
class Shape:
    """A mesh: data × expert processes."""

    data: int = 1
    expert: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    has_group: bool = False
    """Whether one process joins a group of its own as well."""
    is_separate: bool = False
    """Whether the device of the processes is not the host: see `separate_device`."""

    def __str__(self) -> str:
        return f"dp{self.data}ep{self.expert}"

    @property
    def size(self) -> int:
        return self.data * self.expert

    def over(self, overrides: dict[str, Any]) -> dict[str, Any]:
        """Return a cell's overrides with this mesh in them."""
        return merge_settings(overrides, {"parallel": {"data": self.data, "expert": self.expert, **self.options}})

    def run(self, job: Job, *arguments: Any) -> list[Any]:
        """Return what the job returned on each rank."""
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


def _collect(pipes: list[Connection]) -> list[Any]:
    found: dict[int, Any] = {}
    while len(found) < len(pipes):
        ready = wait([pipe for rank, pipe in enumerate(pipes) if rank not in found], LIMIT_S)
        if not ready:
            raise TeamError(f"ranks {sorted(set(range(len(pipes))) - set(found))} said nothing for {LIMIT_S} s")
        for rank, pipe in enumerate(pipes):
            if pipe in ready and rank not in found:
                try:
                    found[rank] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    found[rank] = ("error", "ended without a word")
    errors = [f"rank {rank}: {value}" for rank, (kind, value) in sorted(found.items()) if kind == "error"]
    if errors:
        raise TeamError("\n".join(errors))
    return [found[rank][1] for rank in range(len(pipes))]


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
            _say(pipe, "value", job(mesh, *arguments))
    except BaseException:
        _say(pipe, "error", traceback.format_exc())
    pipe.close()
    os._exit(0)  # threads of a broken group must not keep it


def _say(pipe: Connection, kind: str, value: Any) -> None:
    pipe.send_bytes(pickle.dumps((kind, value)))  # by value: tensors in shared memory would go with their process


__all__ = ["ALONE", "LIMIT_S", "SHAPES", "Mesh", "Shape", "TeamError"]
