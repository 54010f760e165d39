"""Batches made ahead by a thread, in memory from which a GPU copies them while it computes."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence

import torch

from moebench.tasks.task import Batch

NUM_AHEAD = 2
"""Steps whose batches are ready or being copied."""


class PrefetchedSteps:
    """The micro-batches of each step, from a thread that makes them; they are a function of the step alone."""

    def __init__(
        self, make_micro_batches: Callable[[int], Sequence[Batch]], steps: range, device: torch.device
    ) -> None:
        """`device`: where the batches will go; for CUDA they are pinned."""
        self._make_micro_batches = make_micro_batches
        self._steps = steps
        self._device = device
        self._results: queue.Queue[Sequence[Batch] | BaseException] = queue.Queue(maxsize=NUM_AHEAD)
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Sequence[Batch]]:
        """Yield the micro-batches of each step; raise what making them raised."""
        for _ in self._steps:
            result = self._results.get()
            if isinstance(result, BaseException):
                raise result
            yield result

    def close(self) -> None:
        """End the thread; batches that were made ahead are discarded."""
        self._is_closed.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # a thread has its own current device, which pins the memory
            for step in self._steps:
                if not self._put(self._pin(self._make_micro_batches(step))):
                    return
        except BaseException as error:  # it is raised where the batch is asked for
            self._put(error)

    def _pin(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        return [batch.pin_memory() for batch in batches] if self._device.type == "cuda" else batches

    def _put(self, result: Sequence[Batch] | BaseException) -> bool:
        """Wait for a place in the queue; return False if it is closed meanwhile."""
        while not self._is_closed.is_set():
            try:
                self._results.put(result, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False
