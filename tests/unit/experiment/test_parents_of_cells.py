"""Parents of cells: completed before ids are computed, and checked before anything is trained."""

from dataclasses import replace
from pathlib import Path

import pytest
from support.parent_runs import PARENT, child_config, train_parent
from support.training_cases import write_text

from moebench.config import cell_id
from moebench.errors import UsageError
from moebench.experiment.model_costs import ModelCosts
from moebench.experiment.parents import complete_parents, require_parents
from moebench.runs.cell import Cell
from moebench.schema import CellConfig


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
