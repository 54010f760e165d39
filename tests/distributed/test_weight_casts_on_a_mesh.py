"""Weights that are cast once for each update train to the bits of casts at each use, whoever writes the weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.mesh_cases import case
from support.process_group import Mesh, Shape
from support.training_cases import write_text
from support.training_steps import train_steps

from moebench.experts import bank
from moebench.experts.grouped import cast_for_autocast

# Three experts of a process and matrices of odd widths are not divided evenly among copies: they are broadcast.
LAYOUT = {"name": "every_n", "n": 1, "num_experts": 6, "expert_width": 5, "match": "none"}
SHAPES = [Shape(1, 2), *(pytest.param(shape, marks=pytest.mark.slow) for shape in (Shape(2, 1), Shape(2, 2)))]
TRAIN = {"precision": "bf16", "accumulate": 2, "recompute": "blocks", "steps": 4, "weight_decay": 0.1}


def train_both_ways(mesh: Mesh, text: Path, overrides: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    runs = []
    cast_weight = bank.cast_weight
    for name in ("once", "each"):
        (folder / name).mkdir(exist_ok=True)
        if name == "each":
            bank.cast_weight = lambda parameter, local: cast_for_autocast(local)[0]
        try:
            runs.append(train_steps(mesh, text, overrides, folder / name))
        finally:
            bank.cast_weight = cast_weight
    return runs


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training_has_the_same_bits(shape: Shape, optimizer: str, tmp_path: Path) -> None:
    train = TRAIN | {"optimizer": optimizer, "router_learning_rate": 1e-2}
    overrides = case(layout=LAYOUT, train=train, parallel={"shard_optimizer": shape.data > 1})
    for once, each in shape.run(train_both_ways, write_text(tmp_path), shape.over(overrides), tmp_path):
        assert [step["loss"] for step in once["steps"]] == [step["loss"] for step in each["steps"]]
        for name, tensor in each["state"].items():
            assert torch.equal(once["state"][name], tensor), name
        assert once["final"] == each["final"]
