"""Experiments of several sizes with planted results, as a runner leaves them, without training."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from support.comparison_runs import make_cost, make_result
from support.run_folders import write_cell, write_result

from moebench.experiment.grid import Experiment, expand
from moebench.runs.attempts import Attempt, record_attempt


def write_experiment(folder: Path, name: str, *overrides: str, **keys: Any) -> Experiment:
    """Write an experiment of dense and switch, and its text, and expand it."""
    text = folder / "text.txt"
    text.write_text("some words of a text " * 200)
    content = {
        "base": {"task": {"sequence_length": 16, "data": {"path": str(text), "remove_overlap": False}}},
        "grid": {"router": ["dense", "switch"]},
        "seeds": [0, 1, 2],
        "baseline": "dense",
    }
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(content | keys))
    return expand(file, overrides)


def write_size(
    results: Path, experiment: Experiment, log10_flops: float, factors: Mapping[str, float], seconds: Any = None
) -> None:
    """Write finished runs that spent these training FLOPs; an arm performs as the curve at `factors` times as many."""
    rng = np.random.default_rng(int(10 * log10_flops))
    noise = {seed: rng.normal(0, 0.004) for seed in {cell.seed for cell in experiment.cells}}
    for number, cell in enumerate(experiment.cells):
        factor = next((value for arm, value in factors.items() if cell.arm.startswith(arm)), 1.0)
        loss = 1.8 + 3.3 * (10 ** (log10_flops - 13) * factor) ** -0.15
        value = float(loss * np.exp(noise[cell.seed] + rng.normal(0, 0.002)))
        run = make_result(
            cell.arm,
            cell.seed,
            value,
            id=cell.id,
            cost=make_cost(10**log10_flops / 3e6, train_tokens=1e6),
            throughput={"train_s": (seconds or {}).get(cell.arm, 10.0), "tokens_per_s": 1.0},
            validation={"bits_per_byte": value},
        )
        folder = results / "runs" / cell.id
        write_cell(folder, arm=cell.arm, seed=cell.seed)
        write_result(folder, **run.to_dict())
        (folder / "environment.json").write_text(json.dumps({"processor": "x", "device": "cpu", "cores": 1}))
        attempt = Attempt(started_at=100.0 * number, seconds=50.0, status="done", error=None, fault="", step=1)
        record_attempt(folder / "attempts.jsonl", attempt)
