"""The same batch gives the same losses, gradients, norms and updates on one process and on any mesh of them."""

from pathlib import Path
from typing import Any

import pytest
from contract.training_cases import write_text
from distributed.steps import assert_same_training, trained
from distributed.team import ALONE, SHAPES, Shape

STEPS = {"steps": 4, "batch_size": 8, "learning_rate": 1e-2, "clip_norm": 0.5, "log_every": 2, "warmup_steps": 0}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_top_2_on_every_mesh(text: Path, tmp_path: Path, shape: Shape) -> None:
    overrides: dict[str, Any] = {
        "router": {"name": "top_k", "losses": {"load_balance": 0.1, "z": 0.01}},
        "train": STEPS,
    }
    assert_same_training(trained(shape, text, overrides, tmp_path), trained(ALONE, text, overrides, tmp_path))
