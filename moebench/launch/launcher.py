"""Who starts the processes of a cell: this program, or torchrun or SLURM, who started one program for each."""

import os
import socket
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch._C._distributed_c10d import TCPStore

from moebench.errors import UsageError
from moebench.launch.devices import DevicePool, uses_gpu, visible_devices
from moebench.launch.local_worker import Member, NearMember
from moebench.parallel.process_info import SINGLE_PROCESS, ProcessInfo
from moebench.runs.cell import Cell
from moebench.runs.folder import RunFolder
from moebench.schema import TrainConfig

HERE = "127.0.0.1"


class Launch(Protocol):
    """Starts the processes of cells."""

    most_jobs: int
    """Cells at a time that it can start; 0: as many as one likes."""
    patience_s: float
    """How much longer the word of a process may take than through a pipe."""

    def check(self, cells: Sequence[Cell]) -> None:
        """Raise UsageError when there is a cell that it cannot start."""

    def members(self, cell: Cell, results: Path) -> list[Member]:
        """Start the processes of a cell whose folder is described."""

    def release(self, cell: Cell) -> None:
        """Take back what a cell was given, however it ended; nothing if it was given nothing."""

    def stop_wish(self) -> int | None:
        """Return the signal that a process elsewhere was asked to end with, None for none."""


class LocalLauncher:
    """Starts all processes of a cell on this machine; they meet at a store that this process keeps."""

    most_jobs = 0
    patience_s = 0.0

    def __init__(self) -> None:
        self.store: TCPStore | None = None
        self.devices = DevicePool(visible_devices())

    def check(self, cells: Sequence[Cell]) -> None:
        """Raise UsageError for several machines and for more processes than GPUs."""
        for config in [cell.config for cell in cells]:
            if config.parallel.nodes > 1:
                raise UsageError(
                    f"parallel.nodes={config.parallel.nodes}: processes on several machines are started by torchrun"
                    " or SLURM (allowed here: 1)"
                )
            require_devices(config.train, config.parallel.world_size)

    def members(self, cell: Cell, results: Path) -> list[Member]:
        """Start as many processes as the cell asks for, on GPUs of its own where it trains on any."""
        folder, size = RunFolder.of(results, cell.id).path, cell.config.parallel.world_size
        devices = self.devices.lend(cell.id, size) if uses_gpu(cell.config.train) else ()
        if size == 1:
            return [NearMember(folder, results, SINGLE_PROCESS, devices)]
        self.store = self.store or _store_for_this_machine()
        meeting = f"{cell.id}/{uuid.uuid4().hex}"
        process_infos = [
            ProcessInfo(
                rank=rank,
                world_size=size,
                local_rank=rank,
                local_world_size=size,
                store_host=HERE,
                store_port=self.store.port,
                namespace=meeting,
            )
            for rank in range(size)
        ]
        return [NearMember(folder, results, process_info, devices) for process_info in process_infos]

    def release(self, cell: Cell) -> None:
        """Take back the cell's GPUs."""
        self.devices.take_back(cell.id)

    def stop_wish(self) -> int | None:
        """Nobody is elsewhere."""
        return None


def _store_for_this_machine() -> TCPStore:
    """Return a key-value store that listens on the loopback device alone: it asks nobody for a password."""
    listening = socket.create_server((HERE, 0), backlog=1024)
    port = listening.getsockname()[1]
    return TCPStore(HERE, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())


def require_devices(train: TrainConfig, per_node: int) -> None:
    """Raise UsageError when the processes of one node outnumber its GPUs."""
    found = torch.cuda.device_count()
    if uses_gpu(train) and found < per_node:
        raise UsageError(
            f"{per_node} processes on this node and {found} GPU(s): each process needs its own"
            " (choose fewer with parallel.data and parallel.expert, or train.device=cpu)"
        )


@dataclass(frozen=True, kw_only=True)
class Given:
    """A process among those that torchrun or SLURM has started."""

    process_info: ProcessInfo
    """Its own; the meeting is the prefix of all keys of this start."""
    hosts_store: bool
    """Whether the store has yet to be opened, by the first process."""


def given_processes(environment: Mapping[str, str] = os.environ) -> Given | None:
    """Return this process's place if torchrun or SLURM started it as one of several, else None.

    Raises UsageError when they say something that makes no sense.
    """
    for started_by, read in _STARTERS:
        if started_by(environment):
            try:
                return read(environment)
            except (KeyError, ValueError, RuntimeError) as error:
                raise UsageError(f"one of several processes, but its environment is incomplete: {error}") from error
    return None


def _by_torchrun(environment: Mapping[str, str]) -> bool:
    return "TORCHELASTIC_RUN_ID" in environment


def _by_slurm(environment: Mapping[str, str]) -> bool:
    # In an interactive shell the variables of the allocation are there, and nothing was started.
    interactive = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")
    several = "SLURM_PROCID" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1
    return "SLURM_JOB_ID" in environment and several and not interactive


def _of_torchrun(environment: Mapping[str, str]) -> Given:
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    cluster = TorchElasticEnvironment()
    per_node = int(environment["LOCAL_WORLD_SIZE"])
    process_info = ProcessInfo(
        rank=cluster.global_rank(),
        world_size=cluster.world_size(),
        local_rank=cluster.local_rank(),
        local_world_size=per_node,
        node=cluster.node_rank(),
        num_nodes=cluster.world_size() // per_node,
        store_host=cluster.main_address,
        store_port=cluster.main_port,
        namespace=f"moebench/{environment['TORCHELASTIC_RUN_ID']}/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}",
    )
    return Given(process_info=process_info, hosts_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True")


def _of_slurm(environment: Mapping[str, str]) -> Given:
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    cluster = SLURMEnvironment(auto_requeue=False)
    nodes = int(environment["SLURM_NNODES"])
    process_info = ProcessInfo(
        rank=cluster.global_rank(),
        world_size=cluster.world_size(),
        local_rank=cluster.local_rank(),
        local_world_size=cluster.world_size() // nodes,
        node=cluster.node_rank(),
        num_nodes=nodes,
        store_host=cluster.main_address,
        store_port=cluster.main_port,
        namespace=f"moebench/{environment['SLURM_JOB_ID']}/{environment.get('SLURM_STEP_ID', '0')}",
    )
    return Given(process_info=process_info, hosts_store=True)


_STARTERS: tuple[tuple[Callable[[Mapping[str, str]], bool], Callable[[Mapping[str, str]], Given]], ...] = (
    (_by_torchrun, _of_torchrun),
    (_by_slurm, _of_slurm),
)
