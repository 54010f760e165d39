"""Time of the training steps, and the speeds that follow from it."""

import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

WARM_UP_STEPS = 3
"""Steps at the start of a process that throughput leaves out: their first calls allocate and compile."""
RECENT_STEPS = 32
"""Steps over which the speed shown during training is averaged."""


def _record_event() -> Any:
    event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


@dataclass
class StepTimer:
    """Duration of each training step, from the arrival of its batch to the end of the update.

    Evaluation, logging and checkpointing are left out.
    """

    durations_s: list[float] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    """Tokens of each step, without padding."""
    data_waits_s: list[float] = field(default_factory=list)
    """Seconds that each step waited for its batch; not part of `durations_s`."""
    _data_wait_s: float = 0.0
    """Sum of `data_waits_s` after the warm-up."""
    _train_s: float = 0.0
    """Sum of `durations_s` after the warm-up."""
    uses_events: bool = False
    """Whether the device measures the steps, and the host does not wait for their end. What the host waits for batches
    within a step of several micro-batches is then part of the step: the device computes meanwhile."""
    _start_s: float = 0.0
    _pending_wait_s: float = 0.0
    _is_running: bool = False
    _start_event: Any = None
    _pending: deque[tuple[Any, Any, int, float]] = field(default_factory=deque)
    """Events at start and end of steps that the device has not finished, with their tokens and waits."""

    def start(self) -> None:
        """Begin a step."""
        self._start_s = time.perf_counter()
        self._is_running = True
        self._start_event = _record_event() if self.uses_events else None

    def add_data_wait(self, seconds: float) -> None:
        """Add seconds spent on a batch, ending now, to the step that ends next.

        The trainer fetches the next batch before it processes the last micro-batch of a step. With several
        micro-batches this happens within the step, and the wait is excluded from its duration.
        """
        self._pending_wait_s += seconds
        if self._is_running:
            self._start_s += seconds

    def stop(self, device: torch.device, num_tokens: int) -> None:
        """End a step of `num_tokens` tokens.

        With `uses_events` it counts when the device has finished it; else a GPU is synchronized here.
        """
        data_wait_s, self._pending_wait_s, self._is_running = self._pending_wait_s, 0.0, False
        if self._start_event is not None:
            self._pending.append((self._start_event, _record_event(), num_tokens, data_wait_s))
            self._add_finished()
            return
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self._add(time.perf_counter() - self._start_s, num_tokens, data_wait_s)

    def settle(self) -> None:
        """Wait until the device has finished all steps, so that all count."""
        if self._pending:
            self._pending[-1][1].synchronize()
            self._add_finished()

    def _add_finished(self) -> None:
        while self._pending and self._pending[0][1].query():
            start, end, num_tokens, data_wait_s = self._pending.popleft()
            self._add(start.elapsed_time(end) / 1e3, num_tokens, data_wait_s)

    def restore(self, durations_s: Sequence[float], num_tokens: Sequence[int], data_waits_s: Sequence[float]) -> None:
        """Replace all steps by those of the run that is resumed."""
        steps = list(zip(durations_s, num_tokens, data_waits_s, strict=True))
        self.durations_s, self.num_tokens, self.data_waits_s = [], [], []
        self._data_wait_s = self._train_s = 0.0
        for step in steps:
            self._add(*step)

    def _add(self, duration_s: float, num_tokens: int, data_wait_s: float) -> None:
        if len(self.durations_s) >= WARM_UP_STEPS:
            self._data_wait_s += data_wait_s
            self._train_s += duration_s
        self.durations_s.append(duration_s)
        self.num_tokens.append(num_tokens)
        self.data_waits_s.append(data_wait_s)

    @property
    def step_s(self) -> float:
        """Median seconds per step."""
        counted = self.durations_s[WARM_UP_STEPS:] or self.durations_s
        return statistics.median(counted) if counted else 0.0

    @property
    def recent_tokens_per_s(self) -> float:
        """Tokens per second over the last `RECENT_STEPS` steps; its cost does not grow with the run."""
        num_steps = len(self.durations_s)
        first = max(num_steps - RECENT_STEPS, WARM_UP_STEPS if num_steps > WARM_UP_STEPS else 0)
        seconds = sum(self.durations_s[first:])
        return sum(self.num_tokens[first:]) / seconds if seconds else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Median over steps of tokens per second."""
        speeds = [tokens / seconds for tokens, seconds in zip(self.num_tokens, self.durations_s, strict=True)]
        return statistics.median(speeds[WARM_UP_STEPS:] or speeds) if speeds else 0.0

    @property
    def data_share(self) -> float:
        """Share of the training time spent waiting for batches; evaluation and logging are left out."""
        is_short = len(self.durations_s) <= WARM_UP_STEPS
        wait_s = sum(self.data_waits_s) if is_short else self._data_wait_s
        train_s = sum(self.durations_s) if is_short else self._train_s
        return wait_s / (wait_s + train_s) if wait_s else 0.0
