"""Assign the GPUs of this machine to the cells that are running."""

import os
from collections.abc import Mapping, Sequence

import torch

from moebench.errors import UsageError
from moebench.schema import TrainConfig


def visible_devices(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Return the GPUs that this program may use, by their names in CUDA_VISIBLE_DEVICES."""
    count = torch.cuda.device_count()
    names = [name.strip() for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return tuple(names[:count] if names else map(str, range(count)))


def uses_gpu(train: TrainConfig) -> bool:
    """Return whether the processes of a cell train on GPUs of this machine."""
    return train.device != "cpu" and torch.cuda.is_available()


def require_devices(train: TrainConfig, processes_per_node: int) -> None:
    """Raise UsageError if the processes of one node outnumber its GPUs."""
    count = torch.cuda.device_count()
    if uses_gpu(train) and count < processes_per_node:
        raise UsageError(
            f"{processes_per_node} processes on this node and {count} GPU(s): each process needs its own"
            " (choose fewer with parallel.data and parallel.expert, or train.device=cpu)"
        )


class DevicePool:
    """Assigns GPUs to cells, the least used first."""

    def __init__(self, names: Sequence[str]) -> None:
        self.num_users = dict.fromkeys(names, 0)
        self._assigned: dict[str, tuple[str, ...]] = {}

    def acquire(self, cell_id: str, count: int) -> tuple[str, ...]:
        """Return different GPUs for the processes of a cell; if `--jobs` asks for more than fit, cells share GPUs."""
        names = tuple(sorted(self.num_users, key=self.num_users.__getitem__)[:count])  # stable: the first of equals
        for name in names:
            self.num_users[name] += 1
        self._assigned[cell_id] = names
        return names

    def release(self, cell_id: str) -> None:
        """Release the GPUs of a cell, if it has any."""
        for name in self._assigned.pop(cell_id, ()):
            self.num_users[name] -= 1
