"""Which GPUs the cells at work have: each its own, as long as there are enough."""

import os
from collections.abc import Mapping, Sequence

import torch

from moebench.schema import TrainConfig


def visible_devices(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Return the GPUs that this program may use, by the names that CUDA_VISIBLE_DEVICES has for them."""
    number = torch.cuda.device_count()
    given = [name.strip() for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return tuple(given[:number] if given else map(str, range(number)))


def uses_gpu(train: TrainConfig) -> bool:
    """Whether the processes of a cell train on GPUs, on this machine."""
    return train.device != "cpu" and torch.cuda.is_available()


class DevicePool:
    """Lends the GPUs of this machine to cells: always those that the fewest others have at the time."""

    def __init__(self, names: Sequence[str]) -> None:
        self.num_users = dict.fromkeys(names, 0)
        self._lent: dict[str, tuple[str, ...]] = {}

    def lend(self, cell_id: str, number: int) -> tuple[str, ...]:
        """Return GPUs for a cell, different ones; with more cells than fit (`--jobs`) they are shared evenly."""
        chosen = tuple(sorted(self.num_users, key=self.num_users.__getitem__)[:number])  # stable: the first of equals
        for name in chosen:
            self.num_users[name] += 1
        self._lent[cell_id] = chosen
        return chosen

    def take_back(self, cell_id: str) -> None:
        """End what was lent to a cell, if anything was."""
        for name in self._lent.pop(cell_id, ()):
            self.num_users[name] -= 1
