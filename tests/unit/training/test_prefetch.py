"""Batches that a thread makes ahead: their order, errors, and the end of the thread."""

import threading
from typing import Any

import pytest
import torch

from moebench.tasks.task import Batch
from moebench.training.prefetch import NUM_AHEAD, PrefetchedSteps

CPU = torch.device("cpu")


class Maker:
    """Makes one micro-batch with the number of its step, and raises in one of them."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.threads: set[str] = set()
        self.num_made = 0
        self.has_made = threading.Condition()

    def __call__(self, step: int) -> list[Batch]:
        if step == self.fails_at:
            raise OSError("the data are gone")
        self.threads.add(threading.current_thread().name)
        with self.has_made:
            self.num_made += 1
            self.has_made.notify()
        number: Any = torch.full((1, 1), step)
        return [Batch(input_BL=number, target_BP=number, weight_BP=number, domain_B=number[0])]


def test_steps_come_in_order_from_one_thread() -> None:
    maker = Maker()
    prefetched = PrefetchedSteps(maker, range(3, 9), CPU)
    assert [int(batches[0].input_BL) for batches in prefetched] == [3, 4, 5, 6, 7, 8]
    assert maker.threads == {"batches"}
    prefetched.close()


def test_an_error_is_raised_after_the_steps_before_it() -> None:
    steps = iter(PrefetchedSteps(Maker(fails_at=2), range(5), CPU))
    assert [int(next(steps)[0].input_BL) for _ in range(2)] == [0, 1]
    with pytest.raises(OSError, match="the data are gone"):
        next(steps)


def test_only_a_few_steps_are_made_ahead_and_closing_ends_the_thread() -> None:
    maker = Maker()
    prefetched = PrefetchedSteps(maker, range(1000), CPU)
    next(iter(prefetched))
    with maker.has_made:
        maker.has_made.wait_for(lambda: maker.num_made == 2 + NUM_AHEAD, timeout=10)
    prefetched.close()
    assert maker.num_made == 2 + NUM_AHEAD  # the one that was taken, those in the queue, and one in hand
    assert not any(thread.name == "batches" for thread in threading.enumerate())
