"""The probe on classes held out, with the images of each batch divided among processes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.mesh_cases import case
from support.process_group import ALONE, Shape
from support.training_cases import write_text
from support.training_steps import assert_same_training, train_steps, trained_alike

CASES = [(Shape(2, 1), "mean"), (Shape(1, 2), "mean"), (Shape(2, 2), "class_token")]


def write_noisy(folder: Path) -> Path:
    """Write five classes of 40 pictures of 8 x 8 whose greys overlap: the probe must err, or it could not differ."""
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
        # 3 classes · 2 draws · 3 shots: batches of 5 end in one of 3, and the 12 queries in one of 2: less than 4
        # processes, so that some have no image.
        "few_shot": {"shots": [1, 3], "draws": 2},
    }
    return case(task=task, router={"name": "top_k"}, train={"batch_size": 5})


@pytest.mark.parametrize(("shape", "pooling"), CASES, ids=str)
def test_the_probe_is_the_same_on_any_mesh(tmp_path: Path, shape: Shape, pooling: str) -> None:
    text, wanted = write_text(tmp_path), overrides(write_noisy(tmp_path / "pictures"), pooling)
    (alone,) = ALONE.run(train_steps, text, wanted, tmp_path)
    found = trained_alike(shape.run(train_steps, text, shape.over(wanted), tmp_path))
    assert_same_training(found, alone)
    for name in ("few_shot/1", "few_shot/3"):
        assert found["final"][name] == alone["final"][name]
        assert 1 / 3 < alone["final"][name] < 1
