"""The layer benchmark: rows of shapes and loads, each with every variant and library that can run it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moebench.bench.layer.peers.register import PEERS, find_absence_reason
from moebench.bench.layer.problem import make_problem
from moebench.bench.layer.row import Row, measure_row
from moebench.bench.layer.shapes import Shape, check_loads, choose_shapes
from moebench.bench.machine import choose_device, prepare_machine
from moebench.bench.timing import Protocol


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of the command line."""

    shapes: Sequence[str] = ()
    only: Sequence[str] = ()
    loads: Sequence[str] = ()
    """Empty: the loads that each row defines."""
    rounds: int = 7
    threads: int | None = None
    device: str = "auto"
    seed: int = 0
    allocator: str = "keep"

    def rows(self) -> Iterator[tuple[Shape, str]]:
        """Yield shape and load of every row; raise UsageError for unknown ones."""
        loads = check_loads(self.loads)
        for shape in choose_shapes(self.shapes, self.only):
            for load in loads or shape.loads:
                yield shape, load


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """All rows and the machine that they were measured on."""

    rows: tuple[Row, ...]
    absent: dict[str, str]
    """Package -> why it was not measured."""
    machine: dict[str, Any]
    settings: Settings


def measure(settings: Settings, report_progress: Callable[[str], None] = lambda text: None) -> Benchmark:
    """Measure every row; call `report_progress` with a line before each."""
    device = choose_device(settings.device)
    rows_to_measure = list(settings.rows())
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    machine = prepare_machine(threads=settings.threads, allocator=settings.allocator, device=device)
    machine["dtype"] = str(dtype).removeprefix("torch.")
    absent = {peer.package: reason for peer in PEERS if (reason := find_absence_reason(peer))}
    protocol = Protocol(rounds=settings.rounds, device=device)
    rows = []
    for number, (shape, load) in enumerate(rows_to_measure, start=1):
        report_progress(f"[{number}/{len(rows_to_measure)}] {shape.name}: {shape.sizes}, {load} load")
        problem = make_problem(shape, load, seed=settings.seed, device=device, dtype=dtype)
        rows.append(measure_row(problem, protocol))
    return Benchmark(rows=tuple(rows), absent=absent, machine=machine, settings=settings)
