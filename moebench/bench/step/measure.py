"""The step benchmark: the overhead of trainer, logging and metrics over a plain loop, and the parts of a step."""

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from moebench.bench.machine import choose_device, prepare_machine
from moebench.bench.step.parts import PARTS, Stopwatch
from moebench.bench.step.peak import Peak, find_peak
from moebench.bench.step.runs import PlainLoop, build_module, compare_weights, remove_evaluations, time_trainer_block
from moebench.bench.step.uniform import can_force, force_uniform_load
from moebench.bench.timing import Protocol, Spread, Timings
from moebench.cores import available_cores
from moebench.experiment.grid import Experiment, expand, expand_routers
from moebench.routing.values import LayerRecord
from moebench.schema import CellConfig
from moebench.tasks.task import Task
from moebench.training.executed_cost import ExecutedCost
from moebench.training.model import prepare_task
from moebench.training.module import CellModule
from moebench.training.precision import matrix_precision
from moebench.training.utilization import Kind, compute_mfu, count_training_flops, select_kind

DEFAULT_ROUTERS = ("switch", "top_k")
BUILT_IN = (
    "task.sequence_length=128",
    "model={d_model: 128, num_layers: 4, num_heads: 4, ffn_width: 512}",
    "layout={name: every_n, n: 2, num_experts: 8}",
    "train.batch_size=12",
)
"""A language model at about 100 ms a step on two cores of 2021."""
GOAL = 0.05
"""Largest acceptable overhead of the trainer, as a share of a step of 100 ms."""
TELEMETRY_GOAL = 0.02
"""Goal for the telemetry of layers, as a share of the step."""
TRAINER, UNWATCHED, PLAIN, TIMED, UNIFORM = "trainer", "unwatched", "plain", "timed", "uniform"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of the command line."""

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
    allocator: str = "training"

    def cells(self) -> Experiment:
        """Return the experiment whose arms are measured."""
        if self.experiment:
            return expand(self.experiment, self.overrides, self.plugins)
        threads = f"train.threads={self.threads or available_cores()}"
        routers = self.routers or DEFAULT_ROUTERS
        return expand_routers(routers, "language", (*BUILT_IN, threads, *self.overrides), self.plugins)


@dataclass(frozen=True, kw_only=True)
class ArmTimes:
    """The training step of one arm; seconds are medians over rounds of a block's mean."""

    arm: str
    seconds: Mapping[str, float]
    """Variant -> seconds: trainer, unwatched (trainer without the telemetry of layers), plain, timed (plain with
    timers), uniform (plain at a forced even load)."""
    overhead: Spread
    """Trainer over plain in the same round, minus 1."""
    telemetry: Spread | None
    """Trainer over unwatched in the same round, minus 1; None without experts."""
    uniform: Spread | None
    """Plain at a forced even load over plain; None without experts or with a varying number of them per token."""
    parts: Mapping[str, float]
    """Seconds of one step by part, from the blocks with timers."""
    tokens_per_step: int
    peak: Peak
    mfu: float
    """FLOP/s of the trainer, over `peak`."""
    weights_differ_by: float
    """Largest difference between trainer, with and without telemetry, and plain loop after the same number of updates;
    0.0: they did the same work."""
    timings: Timings = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """All arms and the machine that they were measured on."""

    name: str
    arms: tuple[ArmTimes, ...]
    machine: dict[str, Any]
    settings: Settings


def measure(settings: Settings, report_progress: Callable[[str], None] = lambda text: None) -> Benchmark:
    """Measure the training step of every arm of an experiment; call `report_progress` with a line for each."""
    device = choose_device(settings.device)
    experiment = settings.cells()
    cells = [cell for cell in experiment.cells if cell.seed == experiment.cells[0].seed]
    threads = settings.threads or cells[0].config.train.threads
    machine = prepare_machine(threads=threads, allocator=settings.allocator, device=device)
    protocol = Protocol(rounds=settings.rounds, device=device)
    arms, peaks = [], dict[Kind, Peak]()  # measured once, so that arms compare
    for number, cell in enumerate(cells, start=1):
        report_progress(f"[{number}/{len(cells)}] {cell.arm}")
        config = replace(
            cell.config, train=replace(cell.config.train, device="cuda" if device.type == "cuda" else "cpu")
        )
        task = prepare_task(config, settings.results)
        kind = select_kind(config.train)
        with matrix_precision(config.train, device):
            peaks[kind] = peaks.get(kind) or find_peak(config.train, device)
            arms.append(_measure_arm(cell.arm, remove_evaluations(config), task, protocol, settings.steps, peaks[kind]))
    name = str(settings.experiment) if settings.experiment else "built-in language model"
    return Benchmark(name=name, arms=tuple(arms), machine=machine, settings=settings)


def _measure_arm(arm: str, config: CellConfig, task: Task, protocol: Protocol, num_steps: int, peak: Peak) -> ArmTimes:
    modules = {
        name: build_module(config, task, protocol.device) for name in (TRAINER, UNWATCHED, PLAIN, TIMED, UNIFORM)
    }
    modules[UNWATCHED].has_telemetry = False
    force_uniform_load(modules[UNIFORM].layers)
    plain, timed, uniform = (PlainLoop(module=modules[name]) for name in (PLAIN, TIMED, UNIFORM))
    stopwatch, parts = Stopwatch(protocol.device), _PartTimes()
    with tempfile.TemporaryDirectory(prefix="moebench-") as folder:
        turns: dict[str, Callable[[], float]] = {
            TRAINER: lambda: time_trainer_block(modules[TRAINER], num_steps, Path(folder)),
            PLAIN: partial(plain.time_block, num_steps),
            TIMED: lambda: parts.add(timed.time_block(num_steps, stopwatch), stopwatch, num_steps),
        }
        records = plain.route_batch()
        if modules[TRAINER].layers:
            turns[UNWATCHED] = lambda: time_trainer_block(modules[UNWATCHED], num_steps, Path(folder) / UNWATCHED)
        if can_force(records):
            turns[UNIFORM] = partial(uniform.time_block, num_steps)
        timings = protocol.repeat(turns)
    telemetry = timings.ratio(TRAINER, UNWATCHED) if UNWATCHED in turns else None
    tokens_per_step = config.train.batch_size * task.tokens_per_sequence
    tokens_per_s = 1e3 * tokens_per_step / timings.median_ms(TRAINER)
    return ArmTimes(
        arm=arm,
        seconds={name: timings.median_ms(name) / 1e3 for name in turns},
        overhead=_subtract_one(timings.ratio(TRAINER, PLAIN)),
        telemetry=_subtract_one(telemetry) if telemetry else None,
        uniform=timings.ratio(UNIFORM, PLAIN) if UNIFORM in turns else None,
        parts=parts.median(),
        tokens_per_step=tokens_per_step,
        peak=peak,
        mfu=compute_mfu(_count_flops(modules[PLAIN], records), tokens_per_s, peak.flops),
        weights_differ_by=max(
            compare_weights(modules[TRAINER], modules[name]) for name in (PLAIN, UNWATCHED) if name in turns
        ),
        timings=timings,
    )


def _subtract_one(ratio: Spread) -> Spread:
    return Spread(median=ratio.median - 1, low=ratio.low - 1, high=ratio.high - 1)


def _count_flops(module: CellModule, records: Sequence[LayerRecord]) -> float:
    """Return the active FLOPs of the forward pass per token, as executed in a batch with these records."""
    executed = ExecutedCost(module.layers)
    executed.add(records)
    executed.all_reduce(module.mesh)
    return count_training_flops(module.model, module.task, executed.metrics(module.model, module.task))


class _PartTimes:
    """Collects the parts of a step, one value per block."""

    def __init__(self) -> None:
        self.blocks: list[Mapping[str, float]] = []

    def add(self, seconds: float, stopwatch: Stopwatch, num_steps: int) -> float:
        """Add the parts of the last block; return its seconds."""
        self.blocks.append(stopwatch.average_parts(num_steps))
        return seconds

    def median(self) -> dict[str, float]:
        """Return the median seconds of each part."""
        return {name: statistics.median(parts[name] for parts in self.blocks) for name in PARTS}
