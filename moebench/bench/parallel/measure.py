"""The parallel benchmark: the same step, of the same global batch, on one process and on meshes of several."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebench.bench.machine import choose_device, prepare
from moebench.bench.timing import Spread
from moebench.cores import available_cores
from moebench.errors import UsageError
from moebench.experiment.grid import Experiment, expand_config
from moebench.experiment.store import open_results
from moebench.launch.launcher import LocalLauncher
from moebench.launch.scheduler import Outcome, Scheduler
from moebench.runs.cell import Cell
from moebench.runs.folder import RunFolder
from moebench.runs.result import RunResult
from moebench.schema import ExperimentConfig
from moebench.training.model import prepare_task

ALONE, ALL_CORES = "1 process", "1 process, all cores"
LOG_EVERY = 8
"""One step in so many is timed exchange by exchange, which slows it; the median step is none of these."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the command line can choose."""

    processes: Sequence[int] = (1, 2, 4)
    widths: Sequence[int] = (128, 512)
    """Hidden width of one expert, each a model of its own."""
    experts: int = 8
    batch_size: int = 16
    """Sequences of 64 tokens per step, of all processes together."""
    steps: int = 24
    rounds: int = 3
    device: str = "auto"
    overrides: Sequence[str] = ()
    results: Path = Path("results")

    def __post_init__(self) -> None:
        """Refuse meshes that cannot be built."""
        for size in self.processes:
            if size < 1 or self.experts % size:
                raise UsageError(f"--processes {size}: must be at least 1 and divide --experts {self.experts}")

    def meshes(self) -> dict[str, dict[str, Any]]:
        """Return by name what each mesh sets: every way to write its number of processes as data times expert."""
        found: dict[str, dict[str, Any]] = {ALONE: {}}
        if choose_device(self.device).type == "cpu" and available_cores() > 1:
            found[ALL_CORES] = {"train": {"threads": available_cores()}}
        for size in self.processes:
            for expert in (n for n in range(1, size + 1) if size % n == 0 and size > 1):
                mesh = {"data": size // expert, "expert": expert}
                found[f"data {size // expert} x expert {expert}"] = {"parallel": mesh}
        return found

    def experiment(self, width: int) -> Experiment:
        """Return the cells of one expert size, a seed for each round, so that meshes take turns."""
        device = choose_device(self.device).type
        base = {
            "task": {"sequence_length": 64, "eval_windows": 1},
            "model": {"d_model": 128, "num_layers": 4, "num_heads": 4, "ffn_width": 2 * width},
            "layout": {"name": "every_n", "n": 1, "num_experts": self.experts, "expert_width": width, "match": "none"},
            "router": {"name": "top_k", "top_k": 2},
            "train": {
                "steps": self.steps,
                "batch_size": self.batch_size,
                "log_every": LOG_EVERY,
                "eval_every": self.steps,
                "checkpoint_every": self.steps,
                "device": device,
            },
        }
        arms = [{"label": name, **mesh} for name, mesh in self.meshes().items()]
        config = ExperimentConfig(base=base, grid={"arm": arms}, seeds=list(range(self.rounds)), baseline=ALONE)
        return expand_config(f"bench-parallel-{width}", config, self.overrides)


@dataclass(frozen=True, kw_only=True)
class MeshTimes:
    """The training step of one mesh; values are over rounds."""

    name: str
    width: int
    processes: int
    tokens_per_s: Spread
    over_alone: Spread
    """Speed over that of one process in the same round."""
    costs: Mapping[str, float]
    """What the processes cost each other, mean over rounds; empty for one process."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """All meshes and what they were measured on."""

    meshes: tuple[MeshTimes, ...]
    machine: dict[str, Any]
    settings: Settings


def measure(settings: Settings, say: Callable[[str], None] = lambda text: None) -> Benchmark:
    """Train a few steps on every mesh, meshes taking turns; `say` hears a line for each run."""
    machine = prepare(threads=1, allocator="default", device=choose_device(settings.device))
    found: list[MeshTimes] = []
    with tempfile.TemporaryDirectory(prefix="moebench-") as folder:
        for width in settings.widths:
            experiment = settings.experiment(width)
            results = _run(experiment, settings, Path(folder), say)
            found += [_summary(arm, width, results) for arm in experiment.arms]
    return Benchmark(meshes=tuple(found), machine=machine, settings=settings)


def _run(
    experiment: Experiment, settings: Settings, folder: Path, say: Callable[[str], None]
) -> dict[tuple[str, int], RunResult]:
    """Return the result of every arm and round; raise UsageError with the reason when one fails."""
    open_results(folder)
    launcher = LocalLauncher()
    launcher.check(experiment.cells)
    cache = folder / "cache"
    cache.symlink_to((settings.results / "cache").absolute()) if not cache.exists() else None
    (settings.results / "cache").mkdir(parents=True, exist_ok=True)
    prepare_task(experiment.cells[0].config, folder)
    outcomes = Scheduler(folder, experiment.name, 1, Quiet(say), launcher).run(experiment.cells)
    found = {}
    for outcome in outcomes:
        result = RunFolder.of(folder, outcome.cell.id).read_result()
        if outcome.status != "done" or result is None:
            raise UsageError(f"{outcome.cell.arm}: {outcome.error}")
        found[outcome.cell.arm, outcome.cell.seed] = result
    return found


def _summary(arm: str, width: int, results: Mapping[tuple[str, int], RunResult]) -> MeshTimes:
    own = {seed: result.throughput for (name, seed), result in results.items() if name == arm}
    alone = {seed: result.throughput for (name, seed), result in results.items() if name == ALONE}
    shared = [{key: x for key, x in values.items() if key.startswith("parallel/")} for values in own.values()]
    costs = {key.removeprefix("parallel/"): sum(x[key] for x in shared) / len(shared) for key in shared[0]}
    return MeshTimes(
        name=arm,
        width=width,
        processes=int(costs.get("processes", 1)),
        tokens_per_s=Spread.of([values["tokens_per_s"] for values in own.values()]),
        over_alone=Spread.of([own[seed]["tokens_per_s"] / alone[seed]["tokens_per_s"] for seed in own]),
        costs=costs,
    )


class Quiet:
    """Shows the start of each run and nothing else."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say

    def on_start(self, cell: Cell) -> None:
        """Say which mesh it is."""
        self.say(f"round {cell.seed + 1}: {cell.arm}, experts of width {cell.config.layout.expert_width}")

    def on_progress(self, cell: Cell, message: dict[str, Any]) -> None:
        """Steps are short."""

    def on_end(self, outcome: Outcome) -> None:
        """The table will say how."""

    def note(self, text: str) -> None:
        """Pass it on."""
        self.say(text)
