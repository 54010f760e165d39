"""The clock of the steps: what counts as training, and what as waiting for data."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from moebench.training.step_timer import RECENT_STEPS, StepTimer
from support.training_cases import Run, tiny_config, write_text

from moebench.runs.journal import read_journal

CPU = torch.device("cpu")


class Time:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    found = Time()
    monkeypatch.setattr("moebench.training.callback.time", found)
    return found


def step(meter: StepTimer, clock: Time, seconds: float, *waits: float) -> None:
    for wait in waits:
        meter.wait(wait)
    meter.start()
    clock.now += seconds
    meter.stop(CPU, 10)
    clock.now += 100.0  # logs and evaluations between steps


def test_the_share_is_that_of_the_steps_behind_the_first_three(clock: Time) -> None:
    timer = StepTimer()
    for _ in range(3):
        step(meter, clock, 5.0, 4.0)
    step(meter, clock, 2.0, 0.25, 0.25)
    step(meter, clock, 7.0, 0.5)
    assert meter.data_share == 0.1  # (0.5 + 0.5) of (2 + 7 + 1)
    assert meter.step_s == 4.5


def test_a_run_of_few_steps_counts_them_all(clock: Time) -> None:
    timer = StepTimer()
    assert meter.data_share == 0.0
    step(meter, clock, 3.0, 1.0)
    assert meter.data_share == 0.25


def test_a_batch_that_comes_within_a_step_is_waiting_too(clock: Time) -> None:
    timer = StepTimer()
    meter.start()
    clock.now += 2.0
    clock.now += 1.0  # the next step's batches, asked for behind the first micro-batch
    meter.wait(1.0)
    clock.now += 2.0
    meter.stop(CPU, 10)
    assert (meter.seconds, meter.waits) == ([4.0], [1.0])


def test_the_speed_shown_is_that_of_the_last_steps(clock: Time) -> None:
    timer = StepTimer()
    assert meter.recent_tokens_per_s == 0.0
    step(meter, clock, 5.0)
    assert meter.recent_tokens_per_s == 2.0  # 10 tokens in 5 s; of three steps or less all count
    for _ in range(2):
        step(meter, clock, 5.0)
    step(meter, clock, 2.0)
    assert meter.recent_tokens_per_s == 5.0
    for _ in range(RECENT_STEPS - 1):
        step(meter, clock, 2.0)
    step(meter, clock, 2.0 + RECENT_STEPS)
    # 31 steps of 2 s and the last, in which the machine was slow: 320 tokens in 96 s. The median knows nothing of it.
    assert meter.recent_tokens_per_s == pytest.approx(RECENT_STEPS * 10 / (RECENT_STEPS * 3))
    assert meter.tokens_per_s == 5.0


class Counted(list[float]):
    """A list that counts the numbers that are read from it."""

    num_read = 0

    def __iter__(self) -> Iterator[float]:
        for value in super().__iter__():
            Counted.num_read += 1
            yield value

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        Counted.num_read += len(found) if isinstance(index, slice) else 1
        return found


def test_what_is_asked_after_each_step_costs_the_same_in_a_long_run(clock: Time) -> None:
    meter = StepTimer(seconds=Counted(), tokens=Counted(), waits=Counted())
    for _ in range(5000):
        step(meter, clock, 2.0, 0.5)
    Counted.num_read = 0
    assert (meter.recent_tokens_per_s, meter.data_share) == (5.0, 0.2)
    assert 0 < Counted.num_read <= 2 * RECENT_STEPS
    assert meter.tokens_per_s == 5.0  # once, at the end, from all of them
    assert Counted.num_read > 2 * 5000


def test_a_run_that_goes_on_counts_the_steps_before(clock: Time) -> None:
    whole, parts = StepTimer(), StepTimer()
    for number in range(9):
        if number == 5:
            before = parts
            parts = StepTimer()
            parts.restore(before.seconds, before.tokens, before.waits)
        for meter in (whole, parts):
            step(meter, clock, 1.0 + 0.125 * number, 0.01 * number)
    assert (parts.seconds, parts.tokens, parts.waits) == (whole.seconds, whole.tokens, whole.waits)
    assert parts.data_share == whole.data_share  # to the last bit: the sums are made in the same order
    parts.restore(parts.seconds, parts.tokens, parts.waits)
    assert parts.data_share == whole.data_share
    assert parts.recent_tokens_per_s == whole.recent_tokens_per_s


def test_every_step_of_a_run_has_waited_and_a_resumed_one_remembers(tmp_path: Path) -> None:
    config = tiny_config(write_text(tmp_path), train={"accumulate": 2})
    run = Run(config, tmp_path / "run")
    assert run(stop_at=5) is None
    before: dict[str, Any] = run.checkpoint(5)["callbacks"]["CellCallback"]
    result = run()
    assert result is not None
    waits = run.checkpoint(12)["callbacks"]["CellCallback"]["waits"]
    assert waits[:5] == before["waits"]
    assert len(waits) == 12
    # The trainer asks for a batch ahead of the step: there is none behind the last.
    assert all(wait > 0 for wait in waits[:-1])
    points, _ = read_journal(tmp_path / "run" / "journal.jsonl")
    shares = [point.metrics["time/data_share"] for point in points if "time/data_share" in point.metrics]
    assert len(shares) == 12
    assert result.throughput["data_share"] == shares[-1]
