"""Start the processes of a cell on this machine."""

import socket
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from torch._C._distributed_c10d import TCPStore
from typing_extensions import override

from moebench.errors import UsageError
from moebench.launch.devices import DevicePool, require_devices, uses_gpu, visible_devices
from moebench.launch.local_worker import LocalWorker, Worker
from moebench.parallel.process_info import SINGLE_PROCESS, ProcessInfo
from moebench.runs.cell import Cell
from moebench.runs.folder import RunFolder

LOOPBACK = "127.0.0.1"


class Launcher(Protocol):
    """Starts the processes of cells."""

    max_jobs: int
    """Maximum number of cells that run at a time; 0: no limit."""
    message_delay_s: float
    """How much later the messages of workers may arrive than through a pipe."""

    def check(self, cells: Sequence[Cell]) -> None:
        """Raise UsageError if there is a cell that cannot be started."""

    def start(self, cell: Cell, results: Path) -> list[Worker]:
        """Start the processes of a cell, whose run folder has its `cell.json`."""

    def release(self, cell: Cell) -> None:
        """Release the devices of a cell; it may have none."""

    def stop_signal(self) -> int | None:
        """Return the number of the signal that a process on another node has received, or None."""


class LocalLauncher(Launcher):
    """Starts all processes of a cell on this machine; the store for their rendezvous is in this process."""

    max_jobs = 0
    message_delay_s = 0.0

    def __init__(self) -> None:
        self.store: TCPStore | None = None
        self.devices = DevicePool(visible_devices())

    @override
    def check(self, cells: Sequence[Cell]) -> None:
        for config in [cell.config for cell in cells]:
            if config.parallel.nodes > 1:
                raise UsageError(
                    f"parallel.nodes={config.parallel.nodes}: processes on several machines are started by torchrun"
                    " or SLURM (allowed here: 1)"
                )
            require_devices(config.train, config.parallel.world_size)

    @override
    def start(self, cell: Cell, results: Path) -> list[Worker]:
        folder, world_size = RunFolder.of(results, cell.id).path, cell.config.parallel.world_size
        devices = self.devices.acquire(cell.id, world_size) if uses_gpu(cell.config.train) else ()
        if world_size == 1:
            return [LocalWorker(folder, results, SINGLE_PROCESS, devices)]
        self.store = self.store or _open_store()
        namespace = f"{cell.id}/{uuid.uuid4().hex}"
        process_infos = [
            ProcessInfo(
                rank=rank,
                world_size=world_size,
                local_rank=rank,
                local_world_size=world_size,
                store_host=LOOPBACK,
                store_port=self.store.port,
                namespace=namespace,
            )
            for rank in range(world_size)
        ]
        return [LocalWorker(folder, results, process_info, devices) for process_info in process_infos]

    @override
    def release(self, cell: Cell) -> None:
        self.devices.release(cell.id)

    @override
    def stop_signal(self) -> int | None:
        return None


def _open_store() -> TCPStore:
    """Open a store that listens on the loopback device only, because it has no authentication."""
    listening = socket.create_server((LOOPBACK, 0), backlog=1024)
    port = listening.getsockname()[1]
    return TCPStore(LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())
