"""Weights of a parent on several processes: each takes its own experts, and all together those of one process."""

from pathlib import Path
from typing import Any

import torch
from support.parent_runs import build_child, child_config, train_parent
from support.process_group import ALONE, Mesh, Shape
from support.training_cases import Run, write_text
from support.training_steps import gather_tensor
from torch import Tensor

from moebench.runs.recorder import RunRecorder
from moebench.training.callback import RunContext
from moebench.training.model import prepare_task
from moebench.training.train import train_cell

EXPERTS: dict[str, Any] = {"num_experts": 4, "expert_width": None, "match": "none"}
CASES: dict[str, dict[str, Any]] = {
    "upcycled": {"layout": EXPERTS, "init": {"upcycle": {"noise": 0.1, "drop": 0.5, "copies": 3}}},
    "more experts": {"layout": EXPERTS | {"num_experts": 6}},
}


def take(mesh: Mesh, text: Path, results: Path) -> dict[str, dict[str, Tensor]]:
    """Return the weights of every case after they were taken."""
    states = {}
    for name, overrides in CASES.items():
        model, _ = build_child(child_config(text, router="top_k", **overrides), results / name, mesh)
        states[name] = {key: gather_tensor(value) for key, value in model.state_dict().items()}
    return states


def train_new_experts(mesh: Mesh, text: Path, results: Path, folder: Path) -> None:
    train = {"steps": 2, "trainable": "new_experts", "eval_every": 2}
    parallel = {"data": mesh.config.data, "expert": mesh.config.expert}
    config = child_config(text, router="top_k", train=train, parallel=parallel, **CASES["more experts"])
    context = RunContext(RunRecorder(None), folder / "checkpoints", results=results / "more experts")
    train_cell(config, prepare_task(config, results), context, cell_id="0", arm="arm", mesh=mesh)


def test_every_mesh_takes_the_same_weights_and_keeps_frozen_experts(tmp_path: Path) -> None:
    text, shape = write_text(tmp_path), Shape(1, 2)
    train_parent(tmp_path / "upcycled", text)
    train_parent(tmp_path / "more experts", text, router="top_k", layout=EXPERTS)
    [expected] = ALONE.run(take, text, tmp_path)
    for given in shape.run(take, text, tmp_path):
        for name, state in expected.items():
            assert all(torch.equal(given[name][key], state[key]) for key in state), name
    shape.run(train_new_experts, text, tmp_path, tmp_path / "child")
    run = Run(child_config(text, router="top_k", **CASES["more experts"]), tmp_path / "child")
    after = run.checkpoint(2)["state_dict"]
    for key, value in expected["more experts"].items():
        if ".bank." in key:
            assert torch.equal(value[:4], after[f"model.{key}"][:4])
            assert not torch.equal(value[4:], after[f"model.{key}"][4:])
        else:
            assert torch.equal(value, after[f"model.{key}"]), key
