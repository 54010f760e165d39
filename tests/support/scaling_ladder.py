"""Experiments over sizes and numbers of experts, and finished runs that follow a planted law."""

import json
from pathlib import Path

from support.run_folders import write_cell, write_result
from support.tiny_experiment import tiny, write_text

from moebench.analysis.scaling.law import BilinearLaw
from moebench.experiment.grid import Experiment, expand
from moebench.runs.folder import RunFolder

LAW = BilinearLaw(a=-0.08, b=-0.12, c=0.009, d=0.8)
WIDTHS = (16, 32, 64, 128)
FEW = {
    "seeds": [0],
    "grid": {"router": ["dense", "switch"], "layout.num_experts": [2, 4, 8], "model.d_model": [*WIDTHS]},
}


def expand_ladder(folder: Path, **changes) -> Experiment:
    """Return an experiment over widths, routers and numbers of experts."""
    if not (folder / "text").exists():
        write_text(folder / "text")
    values = tiny(**FEW | {"baseline": None} | changes)
    values["base"]["task"].get("data", {})["path"] = str(folder / "text")
    (folder / "ladder.yaml").write_text(json.dumps(values))
    return expand(folder / "ladder.yaml")


def write_runs(experiment: Experiment, results: Path, **changes) -> None:
    """Write a finished run of each cell, whose loss follows the law: parameters and FLOPs grow as the width squared."""
    for cell in experiment.cells:
        num_params = 100.0 * cell.config.model.d_model**2
        num_experts = 1 if cell.config.router.name == "dense" else cell.config.layout.num_experts
        loss = float(10 ** LAW.predict_log_loss(num_params, num_experts)) * (1 + 0.001 * cell.seed)
        cost = {"active_params": num_params + num_experts, "flops_per_token": 2 * num_params, "train_tokens": 1e6}
        fields = {"metrics": {"bits_per_byte": loss}, "validation": {"bits_per_byte": 2 * loss}, "cost": cost} | changes
        folder = RunFolder.of(results, cell.id).path
        write_cell(folder, arm=cell.arm, seed=cell.seed)
        write_result(folder, arm=cell.arm, seed=cell.seed, **fields)
