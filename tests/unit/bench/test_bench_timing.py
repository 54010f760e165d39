"""Timing rules on given numbers: which rounds count, and what a ratio is. No test here measures time."""

import gc

import pytest

from moebench.bench.contention import Usage, parse_busy_seconds
from moebench.bench.timing import MAX_CONTENTION, Protocol, Round, Spread, TimedCall, Timings, disable_collector

STAT = "cpu  100 20 30 1000 50 5 5 40 7 3\ncpu0 1 2 3 4 5 6 7 8 9 10\nintr 5\n"


def test_busy_time_is_all_but_idle_and_waiting() -> None:
    # user 100 + nice 20 + system 30 + irq 5 + softirq 5 + stolen 40 = 200 ticks; guest time is in user already.
    assert parse_busy_seconds(STAT, ticks_per_s=100) == 2.0


def test_share_of_others_leaves_out_our_own_time() -> None:
    start = Usage(wall_s=10.0, own_s=1.0, busy_s=50.0)
    later = Usage(wall_s=12.0, own_s=4.0, busy_s=53.4)  # 3.4 s busy, 3.0 of them ours, of 2 s on 2 cores
    assert start.compute_share_of_others(later, num_cores=2) == pytest.approx(0.1)


def test_share_of_others_stays_between_0_and_1() -> None:
    start = Usage(wall_s=0.0, own_s=0.0, busy_s=0.0)
    assert start.compute_share_of_others(Usage(wall_s=1.0, own_s=2.0, busy_s=1.9), 2) == 0.0  # ticks are coarse
    assert start.compute_share_of_others(Usage(wall_s=1.0, own_s=0.0, busy_s=2.5), 2) == 1.0
    assert start.compute_share_of_others(start, 2) == 0.0


def rounds(*others: float | None) -> list[Round]:
    return [Round(seconds={"a": float(number)}, others=share) for number, share in enumerate(others, start=1)]


def kept_seconds(timings: Timings) -> list[float]:
    return [one.seconds["a"] for one in timings.rounds]


def test_busy_rounds_are_rejected_and_counted() -> None:
    timings = Timings.choose(rounds(0.01, 0.5, 0.0, MAX_CONTENTION, 0.09), num_rounds=3)
    assert kept_seconds(timings) == [1.0, 3.0, 4.0]
    assert (timings.num_rejected, timings.num_contended) == (2, 0)


def test_quiet_rounds_are_kept_as_they_come_not_the_quietest() -> None:
    assert kept_seconds(Timings.choose(rounds(0.05, 0.04, 0.0), num_rounds=2)) == [1.0, 2.0]


def test_without_enough_quiet_rounds_the_least_contended_are_kept_and_counted() -> None:
    timings = Timings.choose(rounds(0.9, 0.3, 0.02, 0.2, 0.5, 0.4), num_rounds=3)
    assert kept_seconds(timings) == [2.0, 3.0, 4.0]
    assert (timings.num_rejected, timings.num_contended) == (3, 2)


def test_unknown_contention_rejects_nothing() -> None:
    timings = Timings.choose(rounds(None, None), num_rounds=2)
    assert (timings.num_rejected, timings.num_contended) == (0, 0)


def test_the_ratio_is_taken_within_each_round() -> None:
    seconds = [(2.0, 1.0), (8.0, 2.0), (3.0, 1.0), (10.0, 2.0), (6.0, 1.0)]  # ratios 2 4 3 5 6
    timings = Timings.choose([Round(seconds={"a": a, "dense": d}, others=0.0) for a, d in seconds], num_rounds=5)
    assert timings.ratio("a", "dense") == Spread(median=4.0, low=3.0, high=5.0)
    assert timings.ratio("dense", "dense") == Spread(median=1.0, low=1.0, high=1.0)
    assert timings.median_ms("a") == 6000.0  # not 4 times the median of dense


def test_one_round_has_no_spread() -> None:
    assert Spread.of([1.5]) == Spread(median=1.5, low=1.5, high=1.5)


def test_variants_take_turns_in_an_order_that_is_reversed_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = iter([0.5, 0.0, 0.0])
    monkeypatch.setattr("moebench.bench.timing.measure_share_of_others", lambda start: next(shares))
    called: list[str] = []

    def turn(name: str) -> float:
        assert not gc.isenabled()
        called.append(name)
        return float(len(called))

    timings = Protocol(rounds=2).repeat({name: lambda name=name: turn(name) for name in "abc"})
    assert "".join(called) == "abccbaabc"  # the first round was busy: a third was needed
    assert [one.seconds["a"] for one in timings.rounds] == [6.0, 7.0]
    assert timings.num_rejected == 1
    assert gc.isenabled()


def test_the_number_of_retries_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moebench.bench.timing.measure_share_of_others", lambda start: 0.9)
    timings = Protocol(rounds=2).repeat({"a": lambda: 1.0})
    assert (len(timings.rounds), timings.num_rejected, timings.num_contended) == (2, 4, 2)


def test_each_call_is_prepared_and_warmed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moebench.bench.timing.measure_share_of_others", lambda start: 0.0)
    monkeypatch.setattr("moebench.bench.timing.MIN_TURN_S", 0.0)
    log: list[str] = []
    timed = TimedCall(call=lambda: log.append("call"), prepare=lambda: log.append("prepare"))
    Protocol(rounds=3).measure({"a": timed})
    assert log == ["prepare", "call"] * (2 + 3)


def test_the_collector_is_restored_after_an_error() -> None:
    with pytest.raises(KeyError), disable_collector():
        raise KeyError
    assert gc.isenabled()
