"""Grids with several axes: keys that mean nothing to an arm are not crossed with it."""

import json
from pathlib import Path

import pytest

from moebench.errors import UsageError
from moebench.experiment.axes import is_unused_by
from moebench.experiment.grid import Experiment, expand


def experiment(tmp_path: Path, grid: dict[str, object], *overrides: str, **keys: object) -> Experiment:
    text = tmp_path / "text.txt"
    text.write_text("some words of a text " * 200)
    file = tmp_path / "axes.yaml"
    content = {"base": {"task": {"data": {"path": str(text)}}}, "grid": grid, "seeds": [0, 1], **keys}
    file.write_text(json.dumps(content))
    return expand(file, overrides)


def test_a_dense_model_is_not_crossed_with_keys_of_experts(tmp_path: Path) -> None:
    grid = {"router": ["dense", "switch"], "layout.num_experts": [4, 8]}
    expanded = experiment(tmp_path, grid, baseline="dense")
    assert expanded.arms == ["dense", "switch, num_experts=4", "switch, num_experts=8"]
    assert "dense is in the grid once: layout.num_experts means nothing to it" in expanded.notes
    assert expanded.axes == {
        "dense": {"router": "dense"},
        "switch, num_experts=4": {"router": "switch", "layout.num_experts": "num_experts=4"},
        "switch, num_experts=8": {"router": "switch", "layout.num_experts": "num_experts=8"},
    }
    assert expanded.cells[0].varies == {"router.name": "dense", "seed": 0}
    # The first of the combinations is kept as it is, so that a store that has it does not train it again.
    crossed = experiment(tmp_path, {"router": ["dense"], "layout.num_experts": [4]})
    assert crossed.cells[0].id == expanded.cells[0].id


def test_a_dense_model_is_crossed_with_keys_of_training(tmp_path: Path) -> None:
    grid = {"train.steps": [3, 5], "router": ["dense", "switch"], "layout": ["every_n", "pyramid"]}
    arms = experiment(tmp_path, grid).arms
    assert [arm for arm in arms if "dense" in arm] == ["steps=3, dense", "steps=5, dense"]
    assert len(arms) == 2 * (1 + 2)


def test_an_option_is_crossed_with_the_routers_that_have_it(tmp_path: Path) -> None:
    expanded = experiment(tmp_path, {"router": ["dense", "switch", "top_k"], "router.top_k": [2, 4]})
    assert expanded.arms == ["dense", "switch", "top_k, top_k=2", "top_k, top_k=4"]
    assert [cell.config.router.name for cell in expanded.cells[:4]] == ["dense", "switch", "top_k", "top_k"]


def test_a_key_that_no_arm_has_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"router\.top_q: router 'switch' has no key 'top_q'"):
        experiment(tmp_path, {"router": ["switch", "hash"], "router.top_q": [1, 2]})


def test_values_given_twice_stay_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the arm 'dense' occurs twice"):
        experiment(tmp_path, {"router": ["dense", "dense", "switch"], "layout.num_experts": [4, 8]})


@pytest.mark.parametrize(
    ("router", "key", "expected"),
    [
        ("dense", "layout.num_experts", True),
        ("dense", "balance.scope", True),
        ("dense", "router.losses.load_balance", True),
        ("dense", "train.router_learning_rate", True),
        ("dense", "train.expert_learning_rate", True),
        ("dense", "train.learning_rate", False),
        ("dense", "model.d_model", False),
        ("hash", "train.router_learning_rate", True),  # a hash has no parameters
        ("hash", "train.expert_learning_rate", False),
        ("switch", "train.router_learning_rate", False),
        ("switch", "layout.num_experts", False),
    ],
)
def test_keys_that_change_nothing(router: str, key: str, expected: bool) -> None:
    assert is_unused_by(router, key) is expected
