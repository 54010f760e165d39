"""`show` of models that cells start from."""

from pathlib import Path
from typing import Any

import pytest
from support.parent_runs import PARENT, child_config, train_parent
from support.pretrained_models import write_model
from support.run_folders import write_cell
from support.training_cases import Run, write_text

from moebench.catalogue.parents import describe_parent, describe_run
from moebench.config import merge_settings, resolve, to_plain
from moebench.errors import UsageError
from moebench.experiment.parents import complete_parents
from moebench.training.initial_weights.load import load_initial_weights
from moebench.training.model import build_initialised_model, prepare_task


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folders") / "mixtral"
    write_model(folder, "mixtral", num_hidden_layers=1)
    return folder


def test_the_settings_of_a_folder_are_those_of_a_cell_that_starts_from_it(tmp_path: Path) -> None:
    write_model(tmp_path / "llama", "llama", num_hidden_layers=2, intermediate_size=64)
    base = describe_parent(f"hf:{tmp_path / 'llama'}")["base"]
    task = {"sequence_length": 8, "eval_windows": 2, "data": {"path": str(write_text(tmp_path))}}
    experts = {"layout": {"num_experts": 4, "match": "none"}, "router": {"name": "mixtral"}}
    config = resolve(merge_settings(merge_settings({"task": task}, base), experts))
    complete = complete_parents(config, None)
    assert complete.init.digest is not None
    model = build_initialised_model(complete, prepare_task(complete, tmp_path))
    loaded = load_initial_weights(complete, model, tmp_path)
    assert loaded is not None
    assert all(".router." in name for name in loaded.plan.new)
    assert not loaded.plan.unused
    config_file = tmp_path / "llama" / "config.json"
    config_file.write_text(config_file.read_text() + "\n")
    with pytest.raises(UsageError, match=r"init.digest: \w{64} is not that of the content of init.from"):
        load_initial_weights(complete, model, tmp_path)


@pytest.mark.parametrize(
    ("router", "takes_gate"),
    [
        ("mixtral", True),
        ("top_k", True),
        ("noisy_top_k", True),
        ({"name": "top_k", "top_k": 3}, True),
        ({"name": "top_k", "renormalise": False}, False),
        ("switch", False),
        ("deepseek_v3", False),
    ],
)
def test_a_router_of_the_same_formula_takes_the_gate_of_a_folder(
    router: str | dict[str, Any], takes_gate: bool, mixtral: Path
) -> None:
    base = describe_parent(f"hf:{mixtral}")["base"]
    task = {"sequence_length": 8, "eval_windows": 2, "data": {"path": str(write_text(mixtral.parent))}}
    config = resolve(merge_settings(merge_settings({"task": task}, base), {"router": router}))
    model = build_initialised_model(config, prepare_task(config, mixtral.parent))
    loaded = load_initial_weights(config, model, mixtral.parent)
    assert loaded is not None
    gate = "backbone.blocks.0.feed_forward.router.gate.weight_ED"
    assert (gate in {each.target for each in loaded.plan.taken}) == takes_gate
    assert (gate in loaded.plan.unused) == (not takes_gate)


def test_a_run_is_shown_with_what_it_has_taken(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    train_parent(tmp_path, text)
    assert "init" not in describe_run("run:0", tmp_path)
    config = child_config(text, router="top_k", train={"steps": 1})
    child = Run(config, tmp_path / "runs" / ("1" * 12), results=tmp_path)
    child.folder.mkdir()
    assert child() is not None
    write_cell(child.folder, config=to_plain(child.config), arm="child")
    shown = describe_run("run:11", tmp_path)
    assert (shown["arm"], shown["init"]["parent"]) == ("child", f"run {PARENT}")
    file = child.folder / "init.json"
    file.write_text(file.read_text().replace("run 0", "run 1"))
    with pytest.raises(UsageError, match=r"init.json: damaged \(its content does not match its checksum\)"):
        describe_run("run:11", tmp_path)
