"""Timing on a shared machine: variants interleaved, order reversed each round, ratios within a round."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch

from moebench.bench.contention import measure_share_of_others, read_usage

WARM_UP_CALLS = 2
MAX_CONTENTION = 0.08
"""Share of the machine that others may use in a round that counts."""
MAX_TRIES = 3
"""Maximum number of rounds as a multiple of those requested; then the least contended ones are kept."""
MIN_TURN_S = 0.02
"""A shorter call is repeated within its turn: the clocks of contention tick every 10 ms."""
MAX_REPEATS = 50


@dataclass(frozen=True, kw_only=True)
class TimedCall:
    """A call to time, after `prepare`, which is not timed."""

    call: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


@dataclass(frozen=True, kw_only=True)
class Round:
    """One turn of every variant."""

    seconds: Mapping[str, float]
    others: float | None = None
    """Share of the machine that other processes used; None where unknown."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A median over rounds and its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarise one value per round."""
        if len(values) == 1:
            return cls(median=values[0], low=values[0], high=values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median=median, low=low, high=high)


@dataclass(frozen=True, kw_only=True)
class Timings:
    """The rounds that count."""

    rounds: tuple[Round, ...]
    num_rejected: int
    num_contended: int
    """Kept rounds in which others used more than MAX_CONTENTION: the machine was too busy for better ones."""

    @classmethod
    def choose(cls, rounds: Sequence[Round], num_rounds: int) -> "Timings":
        """Keep `num_rounds` of the rounds, the least contended ones, in the order of time."""
        ranked = sorted(range(len(rounds)), key=lambda index: (max(_excess(rounds[index]), 0.0), index))
        kept = [rounds[index] for index in sorted(ranked[:num_rounds])]
        contended = sum(_excess(round_) > 0 for round_ in kept)
        return cls(rounds=tuple(kept), num_rejected=len(rounds) - len(kept), num_contended=contended)

    def median_ms(self, name: str) -> float:
        """Return the median time of a variant in milliseconds."""
        return 1e3 * statistics.median(round_.seconds[name] for round_ in self.rounds)

    def ratio(self, name: str, reference: str) -> Spread:
        """Return the time of a variant over that of the reference in the same round."""
        return Spread.of([round_.seconds[name] / round_.seconds[reference] for round_ in self.rounds])


def _excess(round_: Round) -> float:
    return (round_.others or 0.0) - MAX_CONTENTION


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Number of rounds, device, warm-up and retries of a measurement."""

    rounds: int = 7
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    warm_up: int = WARM_UP_CALLS
    tries: int = MAX_TRIES

    def measure(self, variants: Mapping[str, TimedCall]) -> Timings:
        """Time every variant in rounds until enough of them were without contention."""
        with disable_collector():
            repeats = {name: self._warm_up(variant) for name, variant in variants.items()}
        turns = {name: partial(self._turn, variant, repeats[name]) for name, variant in variants.items()}
        return self.repeat(turns)

    def repeat(self, turns: Mapping[str, Callable[[], float]]) -> Timings:
        """Call the turns, which return their seconds, in rounds until enough of them were without contention."""
        rounds: list[Round] = []
        while len(rounds) < self.tries * self.rounds and sum(_excess(r) <= 0 for r in rounds) < self.rounds:
            order = list(turns)[:: 1 if len(rounds) % 2 == 0 else -1]
            with disable_collector():
                rounds.append(self._round({name: turns[name] for name in order}))
        return Timings.choose(rounds, self.rounds)

    def _warm_up(self, variant: TimedCall) -> int:
        """Call a variant until it is warm; return the number of calls in each of its turns."""
        for _ in range(self.warm_up):
            seconds = self._turn(variant, 1)
        return min(max(round(MIN_TURN_S / max(seconds, 1e-6)), 1), MAX_REPEATS)

    def _round(self, turns: Mapping[str, Callable[[], float]]) -> Round:
        start = read_usage() if self.device.type == "cpu" else None
        seconds = {name: turn() for name, turn in turns.items()}
        return Round(seconds=seconds, others=measure_share_of_others(start))

    def _turn(self, variant: TimedCall, repeats: int) -> float:
        total = 0.0
        for _ in range(repeats):
            variant.prepare()
            total += time_call(variant.call, self.device)
        return total / repeats


def time_call(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a call on a device: on a GPU between two events, after which the host waits."""
    return _cuda_seconds(call) if device.type == "cuda" else _wall_seconds(call)


def _wall_seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _cuda_seconds(call: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return 1e-3 * float(begin.elapsed_time(end))


@contextmanager
def disable_collector() -> Iterator[None]:
    """Disable Python's garbage collector: it would run in the middle of a timed call."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
