"""Write a results folder of many finished runs by moebench's own writers, without training anything."""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moebench.config import to_plain
from moebench.experiment.grid import Experiment, expand
from moebench.experiment.store import open_results, record_experiment
from moebench.runs.cell import Cell
from moebench.runs.experiment_record import read_record
from moebench.runs.folder import RunFolder, write_json
from moebench.runs.journal import Journal
from moebench.runs.result import RunResult
from moebench.runs.trivial_baselines import RECORD_KEY, EvaluationSet, StoredBaselines
from moebench.tasks.baselines.baseline import TrivialBaseline

ROUTERS = (
    *("hash", "switch", "top_k", "loss_free", "gshard", "mixtral", "sigma_moe", "deepseek_moe", "st_moe", "v_moe"),
    *("noisy_top_k", "olmoe", "glam", "random", "speech_moe", "mlp_top_k", "x_moe", "stable_moe", "deepseek_v3"),
    *("quantile_balancing", "autonomy_of_experts", "limoe", "reinforce", "conditional_computation", "multi_gate"),
)
DOMAINS = ("code", "dictionary", "docs", "drama", "novels", "scripture", "speeches")
STEPS, EVALS = 600, 8


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The size of a stored experiment."""

    arms: int = 12
    seeds: int = 5
    points: int = 30
    """Logged steps of each journal."""
    layers: int = 2
    name: str = "stored"
    question: str = "Which router is best at equal FLOPs per token?"


def write_grid(folder: Path, grid: Grid) -> Experiment:
    """Write an experiment file and its results to `folder`; return the experiment."""
    file = folder / f"{grid.name}.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(build_experiment(grid), sort_keys=False))
    experiment = expand(file)
    results = folder / "results"
    open_results(results)
    for cell in experiment.cells:
        write_run(results, experiment, cell, grid)
    record_experiment(results, experiment)
    _record_baselines(results, experiment)
    return experiment


def _record_baselines(results: Path, experiment: Experiment) -> None:
    """Add trivial baselines to the record, so that they are not computed from the data."""
    result = RunFolder.of(results, experiment.cells[0].id).read_result()
    assert result is not None
    baselines = (
        TrivialBaseline(
            name="order-3 n-gram", meaning="three bytes", values={"bits_per_byte": 3.04}, is_reference=True
        ),
        TrivialBaseline(name="bz2 -9", meaning="a compressor", values={"bits_per_byte": 2.2}),
    )
    stored = [
        StoredBaselines(
            evaluation=EvaluationSet.of(result, split, ()),
            metric="bits_per_byte",
            lower_is_better=True,
            baselines=baselines,
        ).to_dict()
        for split in ("test", "validation")
    ]
    path = results / "experiments" / f"{experiment.name}.json"
    write_json(path, read_record(path) | {RECORD_KEY: stored})


def build_experiment(grid: Grid) -> dict[str, Any]:
    """Return an experiment of a dense arm and routers, each with as many numbers of experts as the arms need."""
    model = {"d_model": 32, "num_layers": grid.layers, "num_heads": 2, "ffn_width": 64}
    base = {
        "task": {"name": "language", "sequence_length": 64, "eval_windows": 128},
        "model": model | {"tie_embeddings": True},
        "layout": {"name": "every_n", "n": 1, "num_experts": 16},
        "train": {"steps": STEPS, "batch_size": 16, "eval_every": STEPS // EVALS},
    }
    routers = ROUTERS[: grid.arms - 1]
    numbers = [16 * 2**k for k in range(math.ceil((grid.arms - 1) / len(routers)))]
    axes: dict[str, Any] = {"router": ["dense", *routers]}
    axes |= {"layout.num_experts": numbers} if len(numbers) > 1 else {}
    seeds = list(range(grid.seeds))
    return {"question": grid.question, "base": base, "grid": axes, "seeds": seeds, "baseline": "dense"}


def write_run(results: Path, experiment: Experiment, cell: Cell, grid: Grid) -> None:
    """Write cell, journal, loads, environment and result of a finished run; values depend on arm and seed alone."""
    folder = RunFolder.of(results, cell.id)
    folder.write_cell(cell.to_dict(experiment.name))
    arm, noise = random.Random(cell.arm), random.Random(f"{cell.arm}, seed {cell.seed}")
    is_dense = cell.config.router.name == "dense"
    quality = 2.25 + (0 if is_dense else arm.gauss(-0.03, 0.04)) + noise.gauss(0, 0.012)
    speed = (1 if is_dense else arm.uniform(0.5, 0.95)) * 20_000
    load = {} if is_dense else _make_load(arm)
    metrics = {"bits_per_byte": quality} | {
        f"bits_per_byte/{name}": quality + 0.3 * math.sin(number) + noise.gauss(0, 0.02)
        for number, name in enumerate(DOMAINS)
    }
    _write_journal(folder, grid, metrics | load, speed)
    if not is_dense:
        _write_loads(folder, grid, arm)
    environment = {"cores": 2, "device": "cpu", "git_commit": "4a6725951e76", "git_dirty": False, "python": "3.11.7"}
    write_json(folder.environment, environment | {"packages": {"torch": "2.13.0"}, "processor": "a processor"})
    flops = 300_000.0 * (1 if is_dense else arm.uniform(0.985, 1.015))
    costs = dict.fromkeys(("flops_per_token", "train_flops_per_token", "eval_flops_per_token"), flops)
    costs |= dict.fromkeys(("experts_per_token", "train_experts_per_token", "eval_experts_per_token"), 2.0)
    costs |= {"active_params": 150e3, "total_params": 150e3 if is_dense else 200e3, "train_passes": 1.0}
    tokens = float(STEPS * 16 * 64)
    folder.write_result(
        RunResult(
            id=cell.id,
            arm=cell.arm,
            seed=cell.seed,
            status="done",
            error=None,
            step=STEPS,
            metrics=metrics | load,
            validation={name: value + 0.01 for name, value in (metrics | load).items()},
            cost=costs | {"train_tokens": tokens},
            throughput={"tokens_per_s": speed, "step_s": 1024 / speed, "train_s": tokens / speed, "total_s": 40.0},
            data_digest=cell.data_digest,
            eval_digest="eval",
            marks=(),
            config=to_plain(cell.config),
            records=folder.digest_records(),
            version="0.1.0 (0123456789ab)",
        )
    )


def _make_load(arm: random.Random) -> dict[str, float]:
    drop = max(0.0, arm.gauss(0.0, 0.01))
    values = {"max_violation": arm.uniform(0.1, 2), "cv": arm.uniform(0.1, 0.8), "entropy": arm.uniform(0.9, 1.0)}
    values |= {"dead_experts": 0.0, "drop_rate": drop, "train_drop_rate": drop, "unserved": 0.0}
    values |= {"information/domain": arm.uniform(0, 0.1), "information/token": arm.uniform(0.1, 0.4)}
    return {f"load/{name}": value for name, value in values.items()}


def _write_journal(folder: RunFolder, grid: Grid, final: dict[str, float], speed: float) -> None:
    evaluated = {round(STEPS * (index + 1) / EVALS) for index in range(EVALS)}
    logged = {max(1, round(STEPS * (index + 1) / grid.points)) for index in range(grid.points)}
    with Journal(folder.journal) as journal:
        for step in sorted(evaluated | logged):
            excess = 2.0 * math.exp(-step / 120)
            time = 1.79e9 + step * 1024 / speed
            if step in logged:
                train = {f"train/load/value_{index}": excess + index for index in range(12)}
                journal.append(step, {"loss/task": 4 + excess, "train/tokens_per_s": speed} | train, time)
            if step in evaluated:
                journal.append(step, {f"eval/{name}": value + excess for name, value in final.items()}, time)
        journal.append(STEPS, {f"test/{name}": value for name, value in final.items()}, time)


def _write_loads(folder: RunFolder, grid: Grid, arm: random.Random) -> None:
    skew = arm.uniform(0.0, 0.15)
    layers = {
        str(layer): [round(8192 * math.exp(-skew * (expert + layer))) + 10 for expert in range(16)]
        for layer in range(grid.layers)
    }
    lines = [json.dumps({"step": round(STEPS * (index + 1) / EVALS), "layers": layers}) for index in range(EVALS)]
    folder.loads.write_text("\n".join(lines) + "\n", encoding="utf-8")
