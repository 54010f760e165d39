"""A trained run in a results folder, whose weights other cells start from, and models of such cells."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from support.run_folders import write_cell, write_result
from support.training_cases import Run, tiny_config
from torch import Tensor

from moebench.config import to_plain
from moebench.parallel.mesh import SINGLE_PROCESS_MESH, Mesh
from moebench.schema import CellConfig
from moebench.training.evaluation import batch_context
from moebench.training.initial_weights.load import LoadedWeights, load_initial_weights
from moebench.training.model import Model, build_initialised_model, prepare_task

PARENT = "0" * 12
WIDE: dict[str, Any] = {"layout": {"expert_width": None, "match": "none"}}
"""Experts as wide as the dense network."""


def train_parent(results: Path, text: Path, run_id: str = PARENT, **overrides: Any) -> Run:
    """Train a dense run, of three steps, whose weights are far from the initial ones."""
    overrides = {"router": "dense", **overrides}
    train = {"steps": 3, "learning_rate": 0.05, "eval_every": 3} | overrides.pop("train", {})
    run = Run(tiny_config(text, train=train, **overrides), results / "runs" / run_id, cell_id=run_id)
    run.folder.mkdir(parents=True)
    assert run() is not None
    config = to_plain(run.config)
    write_cell(run.folder, config=config, arm="parent")
    write_result(run.folder, arm="parent", step=3, config=config)
    return run


def child_config(text: Path, **overrides: Any) -> CellConfig:
    """Return a cell that starts from the parent."""
    init = {"from": f"run:{PARENT}"} | overrides.pop("init", {})
    return tiny_config(text, init=init, **{**WIDE, **overrides})


def build_child(
    config: CellConfig, results: Path, mesh: Mesh = SINGLE_PROCESS_MESH
) -> tuple[Model, LoadedWeights | None]:
    """Return the model of a cell before its first step, and what it has taken from its parent."""
    model = build_initialised_model(config, prepare_task(config, results), mesh)
    return model, load_initial_weights(config, model, results, mesh)


def read_parent(run: Run) -> Model:
    """Return the model of a run with its last weights."""
    model = build_initialised_model(run.config, prepare_task(run.config, run.folder))
    weights = run.checkpoint(run.config.train.steps)["state_dict"]
    model.load_state_dict({name.removeprefix("model."): value for name, value in weights.items()})
    return model


@torch.no_grad()
def compute_logits(model: Model, config: CellConfig, results: Path) -> Tensor:
    """Return the output of a model for the first evaluation batch."""
    batch = prepare_task(config, results).eval_batches("validation", 2)[0]
    model.eval()
    output, _ = model(batch, batch_context(batch, training=False, seed=config.seed))
    return output if isinstance(output, Tensor) else output.project()


def with_init(config: CellConfig, **upcycle: Any) -> CellConfig:
    """Return a cell with other options of upcycling."""
    return replace(config, init=replace(config.init, upcycle=replace(config.init.upcycle, **upcycle)))
