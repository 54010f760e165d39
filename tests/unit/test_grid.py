"""A grid whose axis sets several keys at once."""

import json
from pathlib import Path

import pytest

from moebench.errors import UsageError
from moebench.experiment.grid import Experiment, expand

ARMS = [
    {"label": "dense", "router": "dense"},
    {"label": "low", "layout": {"name": "first_n", "n": 1, "num_experts": 4}},
    {"label": "wide", "router": {"name": "top_k", "top_k": 4}, "layout.depth": 2, "train": {"steps": 7}},
]


def experiment(tmp_path: Path, *overrides: str, **grid: object) -> Experiment:
    text = tmp_path / "text.txt"
    text.write_text("some words of a text " * 200)
    base = {"task": {"data": {"path": str(text)}}, "router": {"name": "switch", "jitter": 0.0}}
    file = tmp_path / "arms.yaml"
    file.write_text(json.dumps({"base": base, "grid": grid or {"arm": ARMS}, "seeds": [0]}))
    return expand(file, overrides)


def test_each_arm_sets_its_own_keys(tmp_path: Path) -> None:
    found = experiment(tmp_path)
    assert found.arms == ["dense", "low", "wide"]
    dense, low, wide = (cell.config for cell in found.cells)
    assert (dense.router.name, dense.layout.name) == ("dense", "every_n")
    assert (low.router.name, low.router.jitter, low.layout.name, low.layout.num_experts) == (
        "switch",
        0.0,
        "first_n",
        4,
    )
    assert (wide.router.top_k, wide.layout.name, wide.layout.depth, wide.train.steps) == (4, "every_n", 2, 7)
    assert found.cells[0].varies == {"router.name": "dense", "seed": 0}
    assert found.cells[2].varies == {
        "router.name": "top_k",
        "router.top_k": 4,
        "layout.depth": 2,
        "train.steps": 7,
        "seed": 0,
    }


def test_arms_times_another_axis(tmp_path: Path) -> None:
    found = experiment(tmp_path, **{"arm": ARMS[:2], "train.steps": [3, 5]})
    assert found.arms == ["dense, steps=3", "dense, steps=5", "low, steps=3", "low, steps=5"]


def test_an_override_goes_to_the_arms_that_have_the_key(tmp_path: Path) -> None:
    found = experiment(tmp_path, "layout.n=2", "router.top_k=3")
    assert [getattr(cell.config.layout, "n", None) for cell in found.cells] == [2, 2, 2]
    assert found.cells[2].config.router.top_k == 3
    assert found.notes == ("router.top_k applies to wide; the other arms have no such key",)
    with pytest.raises(UsageError, match=r"layout: the grid varies it; choose with 'grid.layout=\[...\]' instead"):
        experiment(tmp_path, "layout.name=every_n")


def test_two_arms_need_two_labels(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="two arms are called 'dense'"):
        experiment(tmp_path, arm=[ARMS[0], {**ARMS[1], "label": "dense"}])
