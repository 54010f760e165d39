"""The step timer: what counts as training time, and what as waiting for data."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training_cases import Run, tiny_config, write_text

from moebench.runs.journal import read_journal
from moebench.training.step_timer import RECENT_STEPS, StepTimer

CPU = torch.device("cpu")


class FakeTime:
    """Stands in for the module `time`: a clock that the test advances."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr("moebench.training.step_timer.time", fake)
    return fake


def run_step(timer: StepTimer, clock: FakeTime, seconds: float, *data_waits_s: float) -> None:
    for wait_s in data_waits_s:
        timer.add_data_wait(wait_s)
    timer.start()
    clock.now += seconds
    timer.stop(CPU, 10)
    clock.now += 100.0  # logs and evaluations between steps


def test_data_share_leaves_out_the_first_three_steps(clock: FakeTime) -> None:
    timer = StepTimer()
    for _ in range(3):
        run_step(timer, clock, 5.0, 4.0)
    run_step(timer, clock, 2.0, 0.25, 0.25)
    run_step(timer, clock, 7.0, 0.5)
    assert timer.data_share == 0.1  # (0.5 + 0.5) of (2 + 7 + 1)
    assert timer.step_s == 4.5


def test_data_share_of_a_short_run_counts_all_steps(clock: FakeTime) -> None:
    timer = StepTimer()
    assert timer.data_share == 0.0
    run_step(timer, clock, 3.0, 1.0)
    assert timer.data_share == 0.25


def test_data_wait_within_a_step_is_not_part_of_its_duration(clock: FakeTime) -> None:
    timer = StepTimer()
    timer.start()
    clock.now += 2.0
    clock.now += 1.0  # the next step's batches, fetched after the first micro-batch
    timer.add_data_wait(1.0)
    clock.now += 2.0
    timer.stop(CPU, 10)
    assert (timer.durations_s, timer.data_waits_s) == ([4.0], [1.0])


def test_recent_speed_covers_the_last_steps_only(clock: FakeTime) -> None:
    timer = StepTimer()
    assert timer.recent_tokens_per_s == 0.0
    run_step(timer, clock, 5.0)
    assert timer.recent_tokens_per_s == 2.0  # 10 tokens in 5 s; up to three steps all count
    for _ in range(2):
        run_step(timer, clock, 5.0)
    run_step(timer, clock, 2.0)
    assert timer.recent_tokens_per_s == 5.0
    for _ in range(RECENT_STEPS - 1):
        run_step(timer, clock, 2.0)
    run_step(timer, clock, 2.0 + RECENT_STEPS)
    # 31 steps of 2 s and a slow last one: 320 tokens in 96 s. The median ignores the slow one.
    assert timer.recent_tokens_per_s == pytest.approx(RECENT_STEPS * 10 / (RECENT_STEPS * 3))
    assert timer.tokens_per_s == 5.0


class CountingList(list[float]):
    """A list that counts the numbers that are read from it."""

    num_read = 0

    def __iter__(self) -> Iterator[float]:
        for value in super().__iter__():
            CountingList.num_read += 1
            yield value

    def __getitem__(self, index: Any) -> Any:
        item = super().__getitem__(index)
        CountingList.num_read += len(item) if isinstance(index, slice) else 1
        return item


def test_metrics_of_every_step_cost_the_same_in_a_long_run(clock: FakeTime) -> None:
    timer = StepTimer(durations_s=CountingList(), num_tokens=CountingList(), data_waits_s=CountingList())
    for _ in range(5000):
        run_step(timer, clock, 2.0, 0.5)
    CountingList.num_read = 0
    assert (timer.recent_tokens_per_s, timer.data_share) == (5.0, 0.2)
    assert 0 < CountingList.num_read <= 2 * RECENT_STEPS
    assert timer.tokens_per_s == 5.0  # once, at the end, from all of them
    assert CountingList.num_read > 2 * 5000


def test_restored_timer_equals_one_that_was_never_interrupted(clock: FakeTime) -> None:
    uninterrupted, resumed = StepTimer(), StepTimer()
    for number in range(9):
        if number == 5:
            before = resumed
            resumed = StepTimer()
            resumed.restore(before.durations_s, before.num_tokens, before.data_waits_s)
        for timer in (uninterrupted, resumed):
            run_step(timer, clock, 1.0 + 0.125 * number, 0.01 * number)
    assert resumed.durations_s == uninterrupted.durations_s
    assert (resumed.num_tokens, resumed.data_waits_s) == (uninterrupted.num_tokens, uninterrupted.data_waits_s)
    assert resumed.data_share == uninterrupted.data_share  # bit for bit: the sums are made in the same order
    resumed.restore(resumed.durations_s, resumed.num_tokens, resumed.data_waits_s)
    assert resumed.data_share == uninterrupted.data_share
    assert resumed.recent_tokens_per_s == uninterrupted.recent_tokens_per_s


def test_data_waits_are_recorded_and_survive_a_resume(tmp_path: Path) -> None:
    config = tiny_config(write_text(tmp_path), train={"accumulate": 2})
    run = Run(config, tmp_path / "run")
    assert run(stop_at=5) is None
    before: dict[str, Any] = run.checkpoint(5)["callbacks"]["CellCallback"]
    result = run()
    assert result is not None
    waits = run.checkpoint(12)["callbacks"]["CellCallback"]["waits"]
    assert waits[:5] == before["waits"]
    assert len(waits) == 12
    # The trainer fetches a batch ahead of its step; after the last step there is none.
    assert all(wait > 0 for wait in waits[:-1])
    points, _ = read_journal(tmp_path / "run" / "journal.jsonl")
    shares = [point.metrics["time/data_share"] for point in points if "time/data_share" in point.metrics]
    assert len(shares) == 12
    assert result.throughput["data_share"] == shares[-1]
