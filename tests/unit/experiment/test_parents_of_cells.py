"""Parents of cells: completed before ids are computed, and checked before anything is trained."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.parent_runs import PARENT, child_config, train_parent
from support.training_cases import write_text

from moebench.config import cell_id
from moebench.errors import UsageError
from moebench.experiment.model_costs import ModelCosts
from moebench.experiment.parents import complete_parents, require_parents
from moebench.init_config import InitConfig
from moebench.pretrained.weights import read_weights
from moebench.runs.cell import Cell
from moebench.schema import CellConfig
from moebench.training.initial_weights.folder import digest_folders


def build_cell(config: CellConfig, arm: str = "child") -> Cell:
    return Cell(id=cell_id(config, "d"), arm=arm, seed=0, config=config, varies={}, plugins=(), data_digest="d")


def test_the_beginning_of_an_id_is_completed(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    train_parent(tmp_path, text)
    config = child_config(text, router="top_k", init={"from": "run:00"})
    complete = complete_parents(config, tmp_path)
    assert complete.init.from_ == f"run:{PARENT}"
    assert cell_id(complete, "d") != cell_id(config, "d")
    with pytest.raises(UsageError, match=r"init.from: 'run:00' is not the id of a run \(allowed: run: and all 12"):
        complete_parents(config, None)
    with pytest.raises(UsageError, match=r"init.from: run: '1' is unknown"):
        complete_parents(replace(config, init=replace(config.init, from_="run:1")), tmp_path)
    with pytest.raises(UsageError, match=r"init.from: hf:\S*nowhere is no local folder; nothing is downloaded"):
        complete_parents(replace(config, init=replace(config.init, from_="hf:nowhere")), tmp_path)


def test_cells_whose_parents_do_not_fit_are_refused_by_arm(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    train_parent(tmp_path, text)
    costs = ModelCosts(tmp_path)
    fitting = build_cell(child_config(text, router="top_k"))
    require_parents([fitting], costs)
    wide = build_cell(child_config(text, router="top_k", model={"d_model": 16}), "wide")
    with pytest.raises(UsageError, match=r"^wide: model.d_model: 16 here, 8 in run 0{12} of init.from \(allowed: 8\)$"):
        require_parents([fitting, wide], costs)
    missing = build_cell(child_config(text, router="top_k", init={"from": "run:" + "1" * 12}), "missing")
    with pytest.raises(UsageError, match=r"^missing: init.from: there is no run 1{12} in "):
        require_parents([missing], costs)


def test_the_digest_of_a_folder_depends_on_which_files_have_its_weights(tmp_path: Path) -> None:
    digests, values = [], []
    for file in ("a.safetensors", "b.safetensors"):
        (tmp_path / "config.json").write_text("{}")
        save_file({"w": torch.zeros(2)}, tmp_path / "a.safetensors")
        save_file({"w": torch.ones(2)}, tmp_path / "b.safetensors")
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": file}}))
        digests.append(digest_folders(InitConfig(from_=f"hf:{tmp_path}")))
        values.append(read_weights(tmp_path)["w"].file.name)
    assert values == ["a.safetensors", "b.safetensors"]
    assert digests[0] != digests[1]


def test_an_arm_is_checked_in_each_stage(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    train_parent(tmp_path, text)
    costs = ModelCosts(tmp_path)
    first = replace(build_cell(child_config(text, router="top_k")), stage="first")
    second = replace(build_cell(child_config(text, router="top_k", model={"d_model": 16})), stage="second")
    with pytest.raises(UsageError, match=r"^child: model.d_model: 16 here, 8 in run 0{12}"):
        require_parents([first, second], costs)
