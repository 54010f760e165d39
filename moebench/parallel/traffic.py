"""Communication cost of expert parallelism: bytes in every step, seconds in the steps that are timed."""

import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from moebench.experts.layer import MoELayer
from moebench.parallel.collectives import CollectiveObserver
from moebench.routing.values import LayerRecord, Routing

WEIGHT_BYTES = 4
"""Bytes of the weight of a row, fp32 in every precision."""


@dataclass
class Traffic(CollectiveObserver):
    """Counts the all-to-alls since `reset`: read and reset between steps; it does not change results.

    In a timed step all processes synchronize before each all-to-all, so that waiting and transfer are measured
    separately; nothing overlaps with communication then.
    """

    is_timed: bool = False
    """Whether all-to-alls are timed."""
    num_bytes: int = 0
    """Bytes sent to other processes."""
    transfer_s: float = 0.0
    """Seconds inside all-to-alls, without the wait for the slowest process; timed steps only."""
    wait_s: float = 0.0
    """Seconds of waiting for the slowest process; timed steps only."""
    num_collectives: int = 0
    """Sums and gathers of statistics and batches: neither all-to-alls nor the averaging of gradients."""
    collective_bytes: int = 0
    """Bytes that these leave on this process."""
    is_counting: bool = True
    """Whether sums and gathers are counted: until the end of the step, before what is only logged."""

    def reset(self, *, is_timed: bool) -> None:
        """Set all counters to 0, and whether the next all-to-alls are timed."""
        self.is_timed, self.num_bytes, self.transfer_s, self.wait_s = is_timed, 0, 0.0, 0.0
        self.num_collectives, self.collective_bytes, self.is_counting = 0, 0, True

    def stop_counting(self) -> None:
        """Leave out the sums and gathers after a step."""
        self.is_counting = False

    @override
    def count_collective(self, num_bytes: int) -> None:
        if self.is_counting:
            self.num_collectives += 1
            self.collective_bytes += num_bytes

    @override
    def all_to_all(
        self, out_RI: Tensor, x_RI: Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup
    ) -> Any:
        num_rows = sum(send) - send[group.rank()]
        self.num_bytes += num_rows * x_RI[:1].numel() * x_RI.element_size() if x_RI.numel() else 0
        if not self.is_timed:
            return super().all_to_all(out_RI, x_RI, receive, send, group)
        start_s = _measure_synchronized_time_s(x_RI)
        dist.all_reduce(torch.zeros(1, device=x_RI.device), group=group)
        ready_s = _measure_synchronized_time_s(x_RI)
        dist.all_to_all_single(out_RI, x_RI, receive, send, group=group)
        self.wait_s += ready_s - start_s
        self.transfer_s += _measure_synchronized_time_s(x_RI) - ready_s
        return None


def _measure_synchronized_time_s(tensor: Tensor) -> float:
    """Return the time after all kernels on the tensor's device have finished."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


def predict_bytes(layers: Sequence[MoELayer], records: Sequence[LayerRecord], element_size: int) -> int:
    """Compute the bytes that this process's tokens move in one training step, from the routing alone.

    Every row goes to its expert and back, in the forward and in the backward pass, with `element_size` bytes per
    element, some with their weight, whose gradient comes back. Other processes send half of these bytes; the sum over
    processes is what `Traffic` counts.
    """
    num_bytes = 0
    for layer, record in zip(layers, records, strict=True):
        bank, rows_E = layer.bank, record.kept.rows_E
        num_bytes += 2 * element_size * bank.elements_sent(rows_E)
        if bank.sends_weights(has_dropout=layer.expert_dropout > 0) and isinstance(record.kept, Routing):
            assert bank.exchange is not None
            num_bytes += 2 * WEIGHT_BYTES * bank.exchange.count_sent_rows(rows_E)
    return num_bytes


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory of this process in GiB: that of its GPU, or its resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
