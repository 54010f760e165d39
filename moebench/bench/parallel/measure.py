"""The parallel benchmark: a step of the same global batch on one process and on meshes of several."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebench.bench.machine import choose_device, prepare_machine
from moebench.bench.timing import Spread
from moebench.cores import available_cores
from moebench.errors import UsageError
from moebench.experiment.grid import Experiment, expand_config
from moebench.experiment.store import open_results
from moebench.launch.launcher import LocalLauncher
from moebench.launch.scheduler import Outcome, SchedulePolicy, Scheduler
from moebench.runs.cell import Cell
from moebench.runs.folder import RunFolder
from moebench.runs.result import RunResult
from moebench.schema import ExperimentConfig
from moebench.training.model import prepare_task

SINGLE, ALL_CORES = "1 process", "1 process, all cores"
LOG_EVERY = 8
"""Steps from one whose exchanges are timed, and slowed down, to the next; the median step is not among them."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of the command line."""

    processes: Sequence[int] = (1, 2, 4)
    widths: Sequence[int] = (128, 512)
    """Hidden width of one expert; each is a separate model."""
    experts: int = 8
    batch_size: int = 16
    """Sequences of 64 tokens per step over all processes."""
    steps: int = 24
    rounds: int = 3
    device: str = "auto"
    overrides: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Refuse meshes that cannot be built."""
        for size in self.processes:
            if size < 1 or self.experts % size:
                raise UsageError(f"--processes {size}: must be at least 1 and divide --experts {self.experts}")

    def meshes(self) -> dict[str, dict[str, Any]]:
        """Return name -> configuration of each mesh: every factorisation of its processes as data times expert."""
        meshes: dict[str, dict[str, Any]] = {SINGLE: {}}
        if choose_device(self.device).type == "cpu" and available_cores() > 1:
            meshes[ALL_CORES] = {"train": {"threads": available_cores()}}
        for size in self.processes:
            for expert in (n for n in range(1, size + 1) if size % n == 0 and size > 1):
                mesh = {"data": size // expert, "expert": expert}
                meshes[f"data {size // expert} x expert {expert}"] = {"parallel": mesh}
        return meshes

    def build_experiment(self, width: int) -> Experiment:
        """Return the cells of one expert width, with a seed for each round, so that meshes take turns."""
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
        config = ExperimentConfig(base=base, grid={"arm": arms}, seeds=list(range(self.rounds)), baseline=SINGLE)
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
    """Cost of communication, mean over rounds; empty for one process."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """All meshes and the machine that they were measured on."""

    meshes: tuple[MeshTimes, ...]
    machine: dict[str, Any]
    settings: Settings


def measure(settings: Settings, report_progress: Callable[[str], None] = lambda text: None) -> Benchmark:
    """Train a few steps on every mesh, meshes taking turns; call `report_progress` with a line for each run."""
    machine = prepare_machine(threads=1, allocator="training", device=choose_device(settings.device))
    meshes: list[MeshTimes] = []
    with tempfile.TemporaryDirectory(prefix="moebench-") as folder:
        for width in settings.widths:
            experiment = settings.build_experiment(width)
            results = _run(experiment, Path(folder), report_progress)
            meshes += [_summarise(arm, width, results) for arm in experiment.arms]
    return Benchmark(meshes=tuple(meshes), machine=machine, settings=settings)


def _run(
    experiment: Experiment, folder: Path, report_progress: Callable[[str], None]
) -> dict[tuple[str, int], RunResult]:
    """Return the result of every arm and round; raise UsageError with the reason when one fails."""
    open_results(folder)
    launcher = LocalLauncher()
    launcher.check(experiment.cells)
    prepare_task(experiment.cells[0].config, folder)
    display = ProgressLines(report_progress)
    outcomes = Scheduler(folder, experiment.name, SchedulePolicy(), display, launcher).run(experiment.cells)
    results = {}
    for outcome in outcomes:
        result = RunFolder.of(folder, outcome.cell.id).read_result()
        if outcome.status != "done" or result is None:
            raise UsageError(f"{outcome.cell.arm}: {outcome.error}")
        results[outcome.cell.arm, outcome.cell.seed] = result
    return results


def _summarise(arm: str, width: int, results: Mapping[tuple[str, int], RunResult]) -> MeshTimes:
    of_arm = {seed: result.throughput for (name, seed), result in results.items() if name == arm}
    single = {seed: result.throughput for (name, seed), result in results.items() if name == SINGLE}
    parallel = [{key: x for key, x in values.items() if key.startswith("parallel/")} for values in of_arm.values()]
    costs = {key.removeprefix("parallel/"): sum(x[key] for x in parallel) / len(parallel) for key in parallel[0]}
    return MeshTimes(
        name=arm,
        width=width,
        processes=int(costs.get("processes", 1)),
        tokens_per_s=Spread.of([values["tokens_per_s"] for values in of_arm.values()]),
        over_alone=Spread.of([of_arm[seed]["tokens_per_s"] / single[seed]["tokens_per_s"] for seed in of_arm]),
        costs=costs,
    )


class ProgressLines:
    """A display that reports the start of each run and notes."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self.report = report

    def on_start(self, cell: Cell) -> None:
        """Report the mesh of a run."""
        self.report(f"round {cell.seed + 1}: {cell.arm}, experts of width {cell.config.layout.expert_width}")

    def on_progress(self, cell: Cell, message: dict[str, Any]) -> None:
        """Do nothing: steps are short."""

    def on_end(self, outcome: Outcome) -> None:
        """Do nothing: the table has the result."""

    def note(self, text: str) -> None:
        """Report a note."""
        self.report(text)
