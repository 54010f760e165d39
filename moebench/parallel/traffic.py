"""What the exchange of rows costs: bytes always, seconds in the steps that are timed."""

import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moebench.experts.layer import MoELayer
from moebench.parallel.collectives import Watch
from moebench.routing.values import LayerRecord


@dataclass
class Traffic(Watch):
    """Counts all-to-alls since `reset`. An instrument: it is read and reset between steps, and decides nothing."""

    timed: bool = False
    """Wait for all processes before each all-to-all, and apart from it: both are then known, and overlap is lost."""
    num_bytes: int = 0
    """Sent to other processes."""
    transfer_s: float = 0.0
    """Inside all-to-alls, without waiting for the slowest process; timed steps only."""
    wait_s: float = 0.0
    """Waiting for the slowest process; timed steps only."""

    def reset(self, *, timed: bool) -> None:
        """Begin to count anew."""
        self.timed, self.num_bytes, self.transfer_s, self.wait_s = timed, 0, 0.0, 0.0

    def all_to_all(
        self, out_RI: Tensor, x_RI: Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup
    ) -> Any:
        """Issue an all-to-all; in a timed step, wait for it."""
        others = sum(send) - send[group.rank()]
        self.num_bytes += others * x_RI[:1].numel() * x_RI.element_size() if x_RI.numel() else 0
        if not self.timed:
            return super().all_to_all(out_RI, x_RI, receive, send, group)
        start = _now(x_RI)
        dist.all_reduce(torch.zeros(1, device=x_RI.device), group=group)
        ready = _now(x_RI)
        dist.all_to_all_single(out_RI, x_RI, receive, send, group=group)
        self.wait_s += ready - start
        self.transfer_s += _now(x_RI) - ready
        return None


def _now(tensor: Tensor) -> float:
    """Return the time in seconds, when all that was asked of the tensor's device is done."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


def predicted_bytes(layers: Sequence[MoELayer], records: Sequence[LayerRecord], element_size: int) -> int:
    """Return the bytes that the rows of this process's tokens cause in one training step, from the routing alone.

    Each row goes to its expert and back, forward, and the same backward; `element_size` bytes for a number. Half of
    them others send: summed over processes it is what `Traffic` counts.
    """
    total = 0
    for layer, record in zip(layers, records, strict=True):
        total += layer.bank.elements_sent(record.kept.rows_E)
    return 2 * element_size * total


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory that this process has used: of its GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
