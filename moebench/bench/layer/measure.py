"""The layer benchmark: rows of shapes and loads, each with every variant and library that can run it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moebench.bench.layer.peers.register import PEERS, absence
from moebench.bench.layer.problem import make_problem
from moebench.bench.layer.row import Row, measure_row
from moebench.bench.layer.shapes import Shape, check_loads, choose
from moebench.bench.machine import choose_device, prepare
from moebench.bench.timing import Protocol


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the command line can choose."""

    shapes: Sequence[str] = ()
    only: Sequence[str] = ()
    loads: Sequence[str] = ()
    """Empty: each row's own."""
    rounds: int = 7
    threads: int | None = None
    device: str = "auto"
    seed: int = 0
    allocator: str = "keep"

    def rows(self) -> Iterator[tuple[Shape, str]]:
        """Yield shape and load of every row; raise UsageError for what is unknown."""
        loads = check_loads(self.loads)
        for shape in choose(self.shapes, self.only):
            for load in loads or shape.loads:
                yield shape, load


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """All rows and what they were measured on."""

    rows: tuple[Row, ...]
    absent: dict[str, str]
    """Package -> why it was not measured."""
    machine: dict[str, Any]
    settings: Settings


def measure(settings: Settings, say: Callable[[str], None] = lambda text: None) -> Benchmark:
    """Measure every row; `say` hears a line of progress before each."""
    device = choose_device(settings.device)
    wanted = list(settings.rows())
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    machine = prepare(threads=settings.threads, allocator=settings.allocator, device=device)
    machine["dtype"] = str(dtype).removeprefix("torch.")
    absent = {peer.package: reason for peer in PEERS if (reason := absence(peer))}
    protocol = Protocol(rounds=settings.rounds, device=device)
    rows = []
    for number, (shape, load) in enumerate(wanted, start=1):
        say(f"[{number}/{len(wanted)}] {shape.name}: {shape.sizes}, {load} load")
        problem = make_problem(shape, load, seed=settings.seed, device=device, dtype=dtype)
        rows.append(measure_row(problem, protocol))
    return Benchmark(rows=tuple(rows), absent=absent, machine=machine, settings=settings)
