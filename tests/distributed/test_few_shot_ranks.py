"""The few-shot probe on held-out classes, with the images of each batch divided among processes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.mesh_cases import case
from support.process_group import ALONE, Shape
from support.training_cases import write_text
from support.training_steps import assert_same_training, train_steps, trained_alike

CASES = [pytest.param(Shape(2, 1), "mean", marks=pytest.mark.slow), (Shape(1, 2), "mean"), (Shape(2, 2), "class_token")]


def write_noisy(folder: Path) -> Path:
    """Write 40 pictures of 8 x 8 in each of five classes whose greys overlap, so that the probe makes errors."""
    draw = np.random.default_rng(0)
    for label in range(5):
        (folder / f"class{label}").mkdir(parents=True)
        for index in range(40):
            grey = np.clip(40 * label + draw.integers(0, 120, (8, 8)), 0, 255).astype(np.uint8)
            Image.fromarray(grey).save(folder / f"class{label}" / f"{index}.png")
    return folder


def overrides(pictures: Path, pooling: str) -> dict[str, Any]:
    task = {
        "name": "vision",
        "patch": 4,
        "pooling": pooling,
        "data": {"path": str(pictures), "size": 8, "held_out_classes": [1, 2, 4]},
        # 3 classes · 2 draws · 3 shots in batches of 5: the last batch has 3 images, that of the 12 queries has 2.
        # These are fewer than 4 processes, so that some have no image.
        "few_shot": {"shots": [1, 3], "draws": 2},
    }
    return case(task=task, router={"name": "top_k"}, train={"batch_size": 5})


@pytest.mark.parametrize(("shape", "pooling"), CASES, ids=str)
def test_probe_is_the_same_on_any_mesh(tmp_path: Path, shape: Shape, pooling: str) -> None:
    text, config = write_text(tmp_path), overrides(write_noisy(tmp_path / "pictures"), pooling)
    (alone,) = ALONE.run(train_steps, text, config, tmp_path)
    trained = trained_alike(shape.run(train_steps, text, shape.over(config), tmp_path))
    assert_same_training(trained, alone)
    for name in ("few_shot/1", "few_shot/3"):
        assert trained["final"][name] == alone["final"][name]
        assert 1 / 3 < alone["final"][name] < 1
