"""The mesh: data × expert processes, the groups that they form, and what they agree on."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed.device_mesh import DeviceMesh

from moebench.errors import UsageError
from moebench.parallel.collectives import GroupRanks
from moebench.parallel.process_info import SINGLE_PROCESS, ProcessInfo
from moebench.parallel.traffic import Traffic
from moebench.ranks import SINGLE_RANK, Ranks, SingleRank, Span
from moebench.schema import ParallelConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class Mesh:
    """The processes of a run as a grid: a row holds one copy of the experts, a column the same experts.

    Rank r stands in row r // expert, column r % expert, so that the processes of a row are neighbours, on one node
    where they fit: rows travel inside a row only.
    """

    config: ParallelConfig = field(default_factory=ParallelConfig)
    process_info: ProcessInfo = SINGLE_PROCESS
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    world: Ranks = SINGLE_RANK
    """All processes, through a communicator of their own: DDP's is busy in the backward pass."""
    row: dist.ProcessGroup | None = None
    """The processes that share a copy of the experts; None: this one has all experts."""
    column: dist.ProcessGroup | None = None
    """The processes that hold the same experts; None where experts are not spread."""
    grid: DeviceMesh | None = None
    """The same for DTensors, with the dimensions data and expert."""
    traffic: Traffic = field(default_factory=Traffic)

    def __post_init__(self) -> None:
        """Ask of values that stay here what is asked of those that are sent: to be on the device."""
        if self.world is SINGLE_RANK:
            object.__setattr__(self, "world", SingleRank(device=self.device))

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.world.size

    @property
    def rank(self) -> int:
        """Which of them this one is."""
        return self.world.rank

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def share(self, total: int, together: int = 1) -> Span:
        """Return which of `total` sequences this process holds: equal parts, the first ones longer by one.

        Parts are counted in runs of `together` sequences, none of which is cut; the last run may be shorter.
        """
        least, more = divmod(-(-total // together), self.size)
        start = min(together * (self.rank * least + min(self.rank, more)), total)
        end = min(start + together * (least + (self.rank < more)), total)
        return Span(start=start, length=end - start, total=total)

    def agree(self, value: Any) -> Any:
        """Return what the first process says."""
        if not dist.is_initialized():
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def collect(self, value: Any) -> list[Any]:
        """Return what each process says, by rank."""
        if not dist.is_initialized():
            return [value]
        said = [None] * self.size
        dist.all_gather_object(said, value)
        return said

    def wait(self) -> None:
        """Return when all processes are here."""
        self.world.sum(torch.zeros(1, device=self.device)).item()  # a GPU's sum is only asked for until it is read


SINGLE_PROCESS_MESH = Mesh()
"""One process."""


@contextlib.contextmanager
def open_mesh(config: ParallelConfig, process_info: ProcessInfo, device: torch.device) -> Iterator[Mesh]:
    """Join the processes of a run and leave them at the end; raise UsageError when there are not as many as asked for.

    After an exception the group is left as it is: to take leave would mean to wait for those that are gone.
    """
    check_world_size(config, process_info)
    if not process_info.has_group:
        yield Mesh(config=config, process_info=process_info, device=device)
        return
    timeout = timedelta(seconds=config.timeout_s)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = TCPStore(process_info.store_host, process_info.store_port, is_master=False, timeout=timeout)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore(process_info.namespace, store),
        rank=process_info.rank,
        world_size=process_info.world_size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    yield _mesh(config, process_info, device, timeout)
    dist.destroy_process_group()


def check_world_size(config: ParallelConfig, process_info: ProcessInfo) -> None:
    """Raise UsageError when the processes that there are make no mesh of the size that is asked for."""
    if config.world_size != process_info.world_size:
        raise UsageError(
            f"parallel.data={config.data} times parallel.expert={config.expert} are {config.world_size} processes,"
            f" and {process_info.world_size} were started (start {config.world_size}, or set the keys to match)"
        )
    if process_info.num_nodes != config.nodes:
        raise UsageError(
            f"parallel.nodes={config.nodes}, and the processes were started on {process_info.num_nodes} nodes"
        )


def _mesh(config: ParallelConfig, process_info: ProcessInfo, device: torch.device, timeout: timedelta) -> Mesh:
    ranks = torch.arange(config.world_size).view(config.data, config.expert)
    everyone = dist.new_group(timeout=timeout)
    # Not init_device_mesh: its groups ignore the timeout, and one of the size of the world would be DDP's own.
    new_groups: Any = dist.new_subgroups_by_enumeration
    row, _ = new_groups(ranks.tolist(), timeout=timeout)
    column, _ = new_groups(ranks.T.tolist(), timeout=timeout)
    spread = config.expert > 1
    return Mesh(
        config=config,
        process_info=process_info,
        device=device,
        world=GroupRanks(everyone, device),
        row=row if spread else None,
        column=column if spread else None,
        grid=DeviceMesh.from_group([column, row], device.type, mesh=ranks, mesh_dim_names=("data", "expert"))
        if spread
        else None,
    )
