"""`train.keep_checkpoints` of a run whose experts are on several processes."""

from pathlib import Path
from typing import Any

import torch
from support.mesh_cases import case
from support.process_group import Mesh, Shape
from support.training_cases import read_checkpoint, tiny_config, write_text

from moebench.parallel.checkpoint import VerifiedCheckpointIO, checkpoint_path
from moebench.runs.recorder import RunRecorder
from moebench.training.callback import RunContext
from moebench.training.model import build_initialised_model, prepare_task
from moebench.training.train import train_cell


def train(mesh: Mesh, text: Path, overrides: dict[str, Any], folder: Path) -> None:
    config = tiny_config(text, **overrides)
    context = RunContext(RunRecorder(None), folder / "checkpoints", should_stop=lambda: True)
    train_cell(config, prepare_task(config, folder), context, cell_id="0", arm="arm", mesh=mesh)


def test_one_process_reads_the_experts_of_all(tmp_path: Path) -> None:
    # Stopped after the first step, with a checkpoint of the same step to compare with.
    text, shape = write_text(tmp_path), Shape(1, 2)
    overrides = shape.over(case(train={"steps": 3, "batch_size": 4, "keep_checkpoints": [1]}))
    shape.run(train, text, overrides, tmp_path)
    saved = read_checkpoint(checkpoint_path(tmp_path / "checkpoints", 1))["state_dict"]
    config = tiny_config(text, **case())
    model = build_initialised_model(config, prepare_task(config, tmp_path))
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    VerifiedCheckpointIO().load_weights(weights, checkpoint_path(tmp_path / "checkpoints" / "kept", 1))
    assert weights.keys() == saved.keys()
    assert all(torch.equal(weights[name], saved[name]) for name in weights)
    assert any("bank" in name for name in weights)
