"""Rank, world size and rendezvous of a process among the processes of a run."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ProcessInfo:
    """One process of a run: its ranks, and the key-value store for the rendezvous."""

    rank: int = 0
    """Rank over all nodes."""
    world_size: int = 1
    local_rank: int = 0
    """Rank on this node; also the index of its GPU."""
    local_world_size: int = 1
    """Processes on this node."""
    node: int = 0
    num_nodes: int = 1
    store_host: str = "127.0.0.1"
    store_port: int = 0
    """Port of the rendezvous store; 0: a single process without a process group."""
    namespace: str = ""
    """Prefix of the store's keys for this launch, so that keys of an earlier launch are not read."""

    @property
    def has_group(self) -> bool:
        """Whether the process belongs to a process group, even one of size 1."""
        return self.store_port > 0


SINGLE_PROCESS = ProcessInfo()
"""A run of one process, without a process group."""
