"""Parents of cells: completed before ids are computed, and checked before anything is trained."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.parent_runs import PARENT, child_config, train_parent
from support.training_cases import write_text

from moebench.config import cell_id, to_plain
from moebench.errors import UsageError
from moebench.experiment.dry_run import list_actions
from moebench.experiment.grid import expand_config
from moebench.experiment.model_costs import ModelCosts
from moebench.experiment.parents import complete_parents, require_parents
from moebench.init_config import InitConfig
from moebench.pretrained.weights import read_weights
from moebench.runs.cell import Cell
from moebench.schema import CellConfig, ExperimentConfig
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
    last = build_cell(child_config(text, router="top_k", init={"from": f"run:{PARENT}@3"}), "last")
    with pytest.raises(
        UsageError, match=rf"^last: init.from: 'run:{PARENT}@3' is the last step of the run \(allowed: run:0"
    ):
        require_parents([last], costs)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("init.from=run:000000000000", None),
        ("model.d_model=16", "top_k: model.d_model: 16 here, 8 in run 000000000000 of init.from (allowed: 8)"),
        ("layout.expert_width=4", "top_k: init.from: backbone.blocks.0.feed_forward.w_in_DF of run 000000000000 has"),
        ("init.from=run:111111111111", "top_k: init.from: the run 111111111111 (parent, seed 0) is resumable, not"),
    ],
)
def test_a_dry_run_checks_parents_and_writes_nothing(override: str, message: str | None, tmp_path: Path) -> None:
    text = write_text(tmp_path)
    train_parent(tmp_path, text)
    unfinished = train_parent(tmp_path, text, run_id="1" * 12)
    (unfinished.folder / "result.json").unlink()
    base: dict[str, Any] = to_plain(child_config(text, router="top_k"))
    del base["seed"]
    base["task"]["sequence_length"] = 12  # not prepared yet, and not the parent's
    before = sorted(tmp_path.rglob("*"))
    experiment = expand_config("children", ExperimentConfig(question="?", base=base, seeds=[0]), [override])
    if message is None:
        assert [row["action"] for row in list_actions(experiment, tmp_path)] == ["train"]
    else:
        with pytest.raises(UsageError) as error:
            list_actions(experiment, tmp_path)
        assert str(error.value).startswith(message)
    assert sorted(tmp_path.rglob("*")) == before


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
