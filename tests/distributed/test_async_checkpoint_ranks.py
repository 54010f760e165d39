"""Threads of two processes write checkpoints while the processes communicate."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.process_group import Mesh, Shape

from moebench.parallel.async_checkpoint import AsyncCheckpointIO
from moebench.parallel.checkpoint import VerifiedCheckpointIO, checkpoint_path


def state(value: float) -> dict[str, Any]:
    optimizer = {"state.weight.exp_avg": torch.full((3, 2), 2 * value), "param_groups.weight.lr": 0.1}
    return {"state_dict": {"weight": torch.full((3, 2), value)}, "optimizer_states": [optimizer]}


def save_while_communicating(mesh: Mesh, folder: Path) -> tuple[list[float], float]:
    checkpoint_io, content = AsyncCheckpointIO(mesh), state(1.0)
    for step in (1, 2, 3):
        content["state_dict"]["weight"].fill_(float(step))
        checkpoint_io.save_checkpoint(content, checkpoint_path(folder, step))
        for _ in range(20):  # in another order than the thread's on each process
            mesh.world.sum(torch.ones(1))
            mesh.gather_objects(time.monotonic())
    checkpoint_io.wait()
    loaded = state(0.0)
    VerifiedCheckpointIO(mesh).load_into(loaded, checkpoint_path(folder, 3))
    return loaded["state_dict"]["weight"].flatten().tolist(), float(mesh.world.sum(torch.ones(1)))


@pytest.mark.slow
def test_two_processes_write_while_they_communicate(tmp_path: Path) -> None:
    assert Shape(2, 1).run(save_while_communicating, tmp_path) == [([3.0] * 6, 2.0)] * 2
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step_0000002.ckpt", "step_0000003.ckpt"]
