"""Numbers of each step on their way from the device to the host, which waits for none of them."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class StepValues:
    """What the host needs to know of a step; over all processes."""

    step: int
    """From 0."""
    total_loss: float
    task_loss: float
    num_stop_requests: float
    grad_norm: float
    """Before clipping."""
    window_loads: Sequence[float] = ()
    """Loads of the watched layers if a window ends with this step; see `telemetry.collapse`."""


class PendingValues:
    """The values of the latest steps, copied while the device computes the next ones."""

    def __init__(self) -> None:
        self._copies: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def put(self, step: int, values_X: Tensor) -> None:
        """Begin to copy the values of a step (fp64), in the order of the fields of `StepValues`."""
        copy_X, event = values_X.to("cpu", non_blocking=True), None
        if values_X.device.type == "cuda":
            event = torch.cuda.current_stream(values_X.device).record_event()
        self._copies.append((step, copy_X, event))

    def take(self, *, keep: int = 0) -> Iterator[StepValues]:
        """Yield the oldest values, all but the latest `keep`; wait for those that are not there yet."""
        while len(self._copies) > keep:
            step, copy_X, event = self._copies.popleft()
            if event is not None:
                event.synchronize()
            total_loss, task_loss, num_stop_requests, grad_norm, *window_loads = copy_X.tolist()
            yield StepValues(
                step=step,
                total_loss=total_loss,
                task_loss=task_loss,
                num_stop_requests=num_stop_requests,
                grad_norm=grad_norm,
                window_loads=window_loads,
            )
