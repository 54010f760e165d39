"""The place of a process among the processes of a run."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which of how many processes this is, and where they meet."""

    rank: int = 0
    """From 0, over all nodes."""
    world_size: int = 1
    local_rank: int = 0
    """On its node, which is also the number of its GPU."""
    local_world_size: int = 1
    """Processes on this node."""
    node: int = 0
    num_nodes: int = 1
    store_host: str = "127.0.0.1"
    store_port: int = 0
    """Of the key-value store through which the processes find each other; 0: there are no others."""
    meeting: str = ""
    """Prefix of the keys of this start, so that those of an earlier one are not met."""

    @property
    def has_group(self) -> bool:
        """Whether there is a process group to join, if only of one."""
        return self.store_port > 0

    def to_dict(self) -> dict[str, Any]:
        """Return the place as plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Place":
        """Rebuild a place from `to_dict`."""
        return cls(**values)


ONLY = Place()
"""One process, with nobody to meet."""
