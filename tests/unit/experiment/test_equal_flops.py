"""Arms of equal FLOPs of training, and the dense parent that continues beside upcycled arms."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from support.training_cases import TINY, write_text

from moebench.errors import UsageError
from moebench.experiment.grid import Experiment, expand
from moebench.experiment.model_costs import ModelCosts


@pytest.fixture
def file(tmp_path: Path) -> Path:
    data = {"path": str(write_text(tmp_path)), "tokenizer": "bytes"}
    task = {**TINY["task"], "data": data}
    layout = {"num_experts": 4, "match": "none"}
    base = {**TINY, "task": task, "layout": layout, "train": {**TINY["train"], "steps": 200, "max_epochs": 1e9}}
    arms = [
        {"label": "top_1", "router": "switch"},
        {"label": "top_2", "router": {"name": "top_k", "top_k": 2}},
        {"label": "scratch", "router": "switch", "init": {"from": None}},
    ]
    stages = [{"name": "dense", "base": {"router": "dense"}}, {"name": "upcycle", "grid": {"arm": arms}}]
    experiment = tmp_path / "upcycle.yaml"
    experiment.write_text(yaml.safe_dump({"base": base, "stages": stages, "seeds": [0]}))
    return experiment


def read_steps(experiment: Experiment) -> dict[str, int]:
    return {cell.arm: cell.config.train.steps for cell in experiment.cells}


def test_the_continued_parent_is_added_with_the_flops_of_the_first_arm(file: Path, tmp_path: Path) -> None:
    experiment = expand(file, results=tmp_path)
    assert experiment.arms == ["top_1", "top_2", "scratch", "dense continued"]
    added = experiment.cells[-1]
    assert (added.config.router.name, added.config.train.trainable) == ("dense", "all")
    assert added.config.init.from_ == experiment.cells[0].config.init.from_
    costs = ModelCosts(tmp_path)
    ratio = costs.training_flops(added.config) / costs.training_flops(experiment.cells[0].config)
    assert ratio == pytest.approx(1, abs=0.01)
    assert any(note.startswith("'dense continued' is added") for note in experiment.notes)
    assert any(note.startswith("top_2: its training has 1.") for note in experiment.notes)
    other_starts = [note.partition(":")[0] for note in experiment.notes if "do not sum to 1" in note]
    assert other_starts == ["top_1"]  # switch weights an expert by its probability; scratch has no parent


def test_equal_flops_give_every_arm_the_steps_for_them(file: Path, tmp_path: Path) -> None:
    experiment = expand(file, ["equal=training_flops"], results=tmp_path)
    steps = read_steps(experiment)
    assert steps["top_1"] == steps["scratch"] == 200
    assert steps["top_2"] < 200 < steps["dense continued"]
    costs = ModelCosts(tmp_path)
    flops = [costs.training_flops(cell.config) for cell in experiment.cells]
    assert max(flops) / min(flops) < 1.01
    assert not any("times the FLOPs" in note for note in experiment.notes)


def test_none_is_added_where_a_dense_arm_goes_on_already(file: Path, tmp_path: Path) -> None:
    text = yaml.safe_load(file.read_text())
    text["stages"][1]["grid"]["arm"].append({"label": "mine", "router": "dense"})
    file.write_text(yaml.safe_dump(text))
    assert expand(file, results=tmp_path).arms == ["top_1", "top_2", "scratch", "mine"]


def test_none_is_added_without_upcycling(file: Path, tmp_path: Path) -> None:
    experts = expand(file, ["stages.dense.base.router=top_k"], results=tmp_path)
    assert experts.arms == ["top_1", "top_2", "scratch"]


def test_too_few_steps_for_equal_flops_are_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"equal: \d+ steps of 'top_2' have .* \(allowed: ±1%; raise train.steps\)"):
        expand(file, ["equal=training_flops", "train.steps=5"], results=tmp_path)


def test_a_continued_parent_of_a_run_needs_a_dense_run(tmp_path: Path, file: Path) -> None:
    overrides: dict[str, Any] = {"seeds": [0]}
    text = yaml.safe_load(file.read_text()) | overrides
    text["base"]["init"] = {"from": "run:0123456789ab"}
    grid = {"router": ["switch"]}
    file.write_text(yaml.safe_dump({"base": text["base"], "grid": grid, "seeds": [0]}))
    assert expand(file, results=tmp_path).arms == ["switch"]  # the missing run is refused before training
