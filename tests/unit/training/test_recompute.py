"""Blocks that are computed again in the backward pass: the same bits in less memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.training_cases import Run, assert_same_tree, tiny_config, write_text
from torch import Tensor

from moebench.config import cell_id
from moebench.training.evaluation import batch_context
from moebench.training.model import build_initialised_model, prepare_task
from moebench.training.module import CellModule


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


CELLS: dict[str, dict[str, Any]] = {
    "noisy_top_k": {"router": "noisy_top_k"},
    "dropout": {"router": "switch", "model": {"residual_dropout": 0.1, "attention_dropout": 0.1}},
    "state": {"router": "loss_free", "layout": {"capacity_factor_train": 0.75, "expert_dropout": 0.1}},
    "bf16": {"router": "top_k", "train": {"precision": "bf16", "accumulate": 2}},
    "soft": {"router": "soft_moe", "allow_noncausal": True},
    "features": {"router": "speech_moe"},
    "encoder_decoder": {"router": "switch", "task": {"name": "span_corruption", "noise_density": 0.5}},
}
QUICK = ("state", "bf16", "encoder_decoder")
"""The others draw at other places, or have another router."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CELLS]
)
def test_a_cell_trains_to_the_same_bits(name: str, text: Path, tmp_path: Path) -> None:
    ended = []
    for choice in ("none", "blocks"):
        options = dict(CELLS[name])
        options["train"] = {"steps": 5, "eval_every": 5, **options.get("train", {}), "recompute": choice}
        run = Run(tiny_config(text, **options), tmp_path / choice)
        assert run() is not None
        ended.append(run)
    assert_same_tree(*(run.checkpoint(5)["state_dict"] for run in ended))
    assert ended[0].points() == ended[1].points()


def count_saved_bytes(text: Path, folder: Path, choice: str) -> int:
    """Return the bytes of the tensors that a training step keeps for its backward pass, outside of blocks alone."""
    config = tiny_config(text, router="top_k", model={"num_layers": 6}, train={"recompute": choice})
    task = prepare_task(config, folder)
    module = CellModule(config, build_initialised_model(config, task), task)
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        batch = task.train_batch(4, 0, 0)
        outputs, records = module.run_passes(batch, batch_context(batch, training=True, seed=0))
        objective, _ = module.compute_loss(batch, outputs, records)
    objective.total.backward()
    return sum(size for address, size in saved.items() if address not in parameters)


def test_activations_inside_blocks_are_not_kept(text: Path, tmp_path: Path) -> None:
    kept, recomputed = (count_saved_bytes(text, tmp_path, choice) for choice in ("none", "blocks"))
    assert recomputed < kept / 3


def test_it_is_no_part_of_the_id(text: Path) -> None:
    ids = {cell_id(tiny_config(text, train={"recompute": choice}), "data") for choice in ("none", "blocks")}
    assert len(ids) == 1
