"""The device mesh of a run: data × expert processes, and the groups among which they communicate."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
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
    """The processes of a run as a grid of `parallel.data` rows and `parallel.expert` columns.

    Rank r is in row r // expert and column r % expert. A row holds one copy of the experts and exchanges tokens by
    all-to-all, so its ranks are consecutive and share a node where they fit. A column holds the same experts.
    """

    config: ParallelConfig = field(default_factory=ParallelConfig)
    process_info: ProcessInfo = SINGLE_PROCESS
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    world: Ranks = SINGLE_RANK
    """All processes, with their own communicator: that of gradients is busy in the backward pass."""
    expert_group: dist.ProcessGroup | None = None
    """The row of this process, which shares one copy of the experts; None: this process has all experts."""
    replica_group: dist.ProcessGroup | None = None
    """The column of this process, which holds the same experts; None where experts are not sharded."""
    device_mesh: DeviceMesh | None = None
    """The mesh of the experts' DTensors, with the dimensions data and expert; None where experts are not sharded."""
    traffic: Traffic = field(default_factory=Traffic)
    object_group: dist.ProcessGroup | None = None
    """Where objects are gathered, and checkpoints are coordinated; None: the default group."""

    def __post_init__(self) -> None:
        """Give `world` the device of the mesh: values must be on it even where no communication happens."""
        if self.world is SINGLE_RANK:
            object.__setattr__(self, "world", SingleRank(device=self.device))

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.world.size

    @property
    def rank(self) -> int:
        """Rank of this process, from 0."""
        return self.world.rank

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes the files that are written once."""
        return self.rank == 0

    def split_sequences(self, total: int, group_size: int = 1) -> Span:
        """Return which of `total` sequences belong to this process.

        The sequences are cut into groups of `group_size`, the last of which may be shorter; every process gets the
        same number of groups, the first ones one more where it does not divide.
        """
        least, remainder = divmod(-(-total // group_size), self.size)
        starts = [min(group_size * (rank * least + min(rank, remainder)), total) for rank in range(self.size + 1)]
        lengths = tuple(end - start for start, end in pairwise(starts))
        return Span(start=starts[self.rank], length=lengths[self.rank], total=total, lengths=lengths)

    def broadcast_object(self, value: Any) -> Any:
        """Return rank 0's value on every process."""
        if not dist.is_initialized():
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device, group=self.object_group)
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Return the values of all processes, by rank."""
        if not dist.is_initialized():
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.object_group)
        return values

    def barrier(self) -> None:
        """Block until all processes have called it."""
        self.world.sum(torch.zeros(1, device=self.device)).item()  # reading the sum is what waits for a GPU


SINGLE_PROCESS_MESH = Mesh()
"""A mesh of one process on the CPU."""


@contextlib.contextmanager
def open_mesh(config: ParallelConfig, process_info: ProcessInfo, device: torch.device) -> Iterator[Mesh]:
    """Join the process group of a run, and leave it at the end.

    Raises UsageError when the number of processes is not the configured one. After an exception the group is not
    destroyed: that would block until the processes that failed have left it too.
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
    yield _build_mesh(config, process_info, device, timeout)
    dist.destroy_process_group()


def check_world_size(config: ParallelConfig, process_info: ProcessInfo) -> None:
    """Raise UsageError unless the number of processes and of nodes is the configured one."""
    if config.world_size != process_info.world_size:
        raise UsageError(
            f"parallel.data={config.data} times parallel.expert={config.expert} are {config.world_size} processes,"
            f" and {process_info.world_size} were started (start {config.world_size}, or set the keys to match)"
        )
    if process_info.num_nodes != config.nodes:
        nodes = process_info.num_nodes
        raise UsageError(f"parallel.nodes={config.nodes}, and the processes were started on {nodes} nodes")


def _build_mesh(config: ParallelConfig, process_info: ProcessInfo, device: torch.device, timeout: timedelta) -> Mesh:
    ranks_DE = torch.arange(config.world_size).view(config.data, config.expert)
    traffic = Traffic()
    world = GroupRanks(dist.new_group(timeout=timeout), device, traffic)
    # Not init_device_mesh: its groups ignore the timeout, and one of the size of the world would be that of gradients.
    new_groups: Any = dist.new_subgroups_by_enumeration
    row, _ = new_groups(ranks_DE.tolist(), timeout=timeout)
    column, _ = new_groups(ranks_DE.T.tolist(), timeout=timeout)
    if config.expert == 1:
        return Mesh(config=config, process_info=process_info, device=device, world=world, traffic=traffic)
    return Mesh(
        config=config,
        process_info=process_info,
        device=device,
        world=world,
        expert_group=row,
        replica_group=column,
        traffic=traffic,
        device_mesh=DeviceMesh.from_group([column, row], device.type, mesh=ranks_DE, mesh_dim_names=("data", "expert")),
    )
