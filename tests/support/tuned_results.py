"""A tuned experiment, and results of its runs as a runner leaves them, without training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.comparison_runs import make_result
from support.run_folders import write_cell, write_result

from moebench.experiment.grid import Experiment, expand
from moebench.experiment.trials import Trial
from moebench.runs.cell import Cell

TUNE = {
    "grid": {"train.learning_rate": [0.001, 0.002, 0.004], "router.losses.load_balance": [0.01, 0.1]},
    "seeds": [100, 101],
}


def expand_tuned(folder: Path, *overrides: str, tune: Any = TUNE, routers: Any = None, **keys: Any) -> Experiment:
    """Write an experiment with tuning, and its text, and expand it."""
    text = folder / "text.txt"
    text.write_text("some words of a text " * 200)
    content = {
        "base": {"task": {"sequence_length": 16, "data": {"path": str(text)}}},
        "grid": {"router": routers or ["dense", "switch", "hash"]},
        "seeds": [0, 1, 2],
        "baseline": "dense",
        "tune": tune,
    }
    file = folder / "tuned.yaml"
    file.write_text(json.dumps(content | keys))
    return expand(file, overrides)


def write_done(results: Path, cell: Cell, value: float) -> None:
    """Write a finished run; on the test split its metric is 1 higher than on validation."""
    run = make_result(cell.arm, cell.seed, value + 1).to_dict() | {"id": cell.id}
    write_cell(results / "runs" / cell.id, arm=cell.arm, seed=cell.seed)
    write_result(results / "runs" / cell.id, **run | {"validation": {"bits_per_byte": value}})


def write_failed(results: Path, cell: Cell, fault: str = "diverged") -> None:
    """Write a run that has failed."""
    values = {"id": cell.id, "arm": cell.arm, "seed": cell.seed, "status": "failed", "fault": fault}
    write_cell(results / "runs" / cell.id, arm=cell.arm, seed=cell.seed)
    write_result(results / "runs" / cell.id, **values, error="loss is nan at step 4")


def write_trials(results: Path, experiment: Experiment, value: Callable[[str, Trial, int], float | None]) -> None:
    """Write the tuning runs with `value(arm, trial, seed)` as metric; those for which it is None have diverged."""
    assert experiment.tuning is not None
    for arm in experiment.tuning.arms:
        for trial in arm.trials:
            for cell in trial.cells:
                quality = value(arm.arm, trial, cell.seed)
                if quality is None:
                    write_failed(results, cell)
                else:
                    write_done(results, cell, quality)
