"""The step benchmark: what the trainer, logging and metrics add to a plain loop, and where a step's time goes."""

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from moebench.bench.machine import choose_device, prepare
from moebench.bench.step.parts import PARTS, Stopwatch
from moebench.bench.step.runs import PlainLoop, endless, new_module, same_weights, trainer_block
from moebench.bench.step.uniform import can_force, force_uniform_load
from moebench.bench.timing import Protocol, Spread, Timings
from moebench.cores import available_cores
from moebench.experiment.grid import Experiment, expand, expand_routers
from moebench.schema import CellConfig
from moebench.tasks.task import Task
from moebench.training.model import prepare_task

ROUTERS_BY_DEFAULT = ("switch", "top_k")
BUILT_IN = (
    "task.sequence_length=128",
    "model={d_model: 128, num_layers: 4, num_heads: 4, ffn_width: 512}",
    "layout={name: every_n, n: 2, num_experts: 8}",
    "train.batch_size=12",
)
"""A language model at about 100 ms a step on two cores of 2021."""
GOAL = 0.05
"""The trainer may add this share to a step of 100 ms."""
TRAINER, PLAIN, PARTED, UNIFORM = "trainer", "plain", "parted", "uniform"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the command line can choose."""

    experiment: Path | None = None
    routers: Sequence[str] = ()
    overrides: Sequence[str] = ()
    plugins: Sequence[str] = ()
    results: Path = Path("results")
    steps: int = 20
    """Timed steps of a block."""
    rounds: int = 7
    threads: int | None = None
    device: str = "auto"
    allocator: str = "default"

    def cells(self) -> Experiment:
        """Return the experiment whose arms are measured."""
        if self.experiment:
            return expand(self.experiment, self.overrides, self.plugins)
        threads = f"train.threads={self.threads or available_cores()}"
        routers = self.routers or ROUTERS_BY_DEFAULT
        return expand_routers(routers, "language", (*BUILT_IN, threads, *self.overrides), self.plugins)


@dataclass(frozen=True, kw_only=True)
class ArmTimes:
    """The training step of one arm; seconds are medians over rounds of a block's mean."""

    arm: str
    seconds: Mapping[str, float]
    """By way: trainer, plain, parted (plain with timers), uniform (plain at a forced even load)."""
    overhead: Spread
    """Trainer over plain in the same round, minus 1."""
    uniform: Spread | None
    """Plain at a forced even load over plain; None where there is no load, or no rectangle to deal."""
    parts: Mapping[str, float]
    """Seconds of one step by part, from the blocks with timers."""
    tokens_per_step: int
    weights_differ_by: float
    """Between trainer and plain loop after the same number of updates; 0.0: the same work was done."""
    timings: Timings = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """All arms and what they were measured on."""

    name: str
    arms: tuple[ArmTimes, ...]
    machine: dict[str, Any]
    settings: Settings


def measure(settings: Settings, say: Callable[[str], None] = lambda text: None) -> Benchmark:
    """Measure the training step of every arm of an experiment; `say` hears a line of progress for each."""
    device = choose_device(settings.device)
    experiment = settings.cells()
    cells = [cell for cell in experiment.cells if cell.seed == experiment.cells[0].seed]
    threads = settings.threads or cells[0].config.train.threads
    machine = prepare(threads=threads, allocator=settings.allocator, device=device)
    protocol = Protocol(rounds=settings.rounds, device=device)
    arms = []
    for number, cell in enumerate(cells, start=1):
        say(f"[{number}/{len(cells)}] {cell.arm}")
        config = replace(
            cell.config, train=replace(cell.config.train, device="cuda" if device.type == "cuda" else "cpu")
        )
        task = prepare_task(config, settings.results)
        arms.append(_measure_arm(cell.arm, endless(config), task, protocol, settings.steps))
    name = str(settings.experiment) if settings.experiment else "built-in language model"
    return Benchmark(name=name, arms=tuple(arms), machine=machine, settings=settings)


def _measure_arm(arm: str, config: CellConfig, task: Task, protocol: Protocol, num_steps: int) -> ArmTimes:
    modules = {way: new_module(config, task, protocol.device) for way in (TRAINER, PLAIN, PARTED, UNIFORM)}
    force_uniform_load(modules[UNIFORM].layers)
    plain, parted, uniform = (PlainLoop(module=modules[way]) for way in (PLAIN, PARTED, UNIFORM))
    watch, parts = Stopwatch(protocol.device), _Parts()
    with tempfile.TemporaryDirectory(prefix="moebench-") as folder:
        turns: dict[str, Callable[[], float]] = {
            TRAINER: lambda: trainer_block(modules[TRAINER], num_steps, Path(folder)),
            PLAIN: partial(plain.block, num_steps),
            PARTED: lambda: parts.after(parted.block(num_steps, watch), watch, num_steps),
        }
        if can_force(plain.records()):
            turns[UNIFORM] = partial(uniform.block, num_steps)
        timings = protocol.repeat(turns)
    overhead = timings.ratio(TRAINER, PLAIN)
    return ArmTimes(
        arm=arm,
        seconds={way: timings.median_ms(way) / 1e3 for way in turns},
        overhead=Spread(median=overhead.median - 1, low=overhead.low - 1, high=overhead.high - 1),
        uniform=timings.ratio(UNIFORM, PLAIN) if UNIFORM in turns else None,
        parts=parts.median(),
        tokens_per_step=config.train.batch_size * task.tokens_per_sequence,
        weights_differ_by=same_weights(modules[TRAINER], modules[PLAIN]),
        timings=timings,
    )


class _Parts:
    """Collects the parts of a step, one value per block."""

    def __init__(self) -> None:
        self.found: list[Mapping[str, float]] = []

    def after(self, seconds: float, watch: Stopwatch, num_steps: int) -> float:
        """Note the parts of the block that has just ended; return its seconds."""
        self.found.append(watch.by_part(num_steps))
        return seconds

    def median(self) -> dict[str, float]:
        """Return the median seconds of each part."""
        return {name: statistics.median(parts[name] for parts in self.found) for name in PARTS}
