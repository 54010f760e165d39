import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from support.case_selection import parametrize_pairs

from moebench.config import (
    apply_overrides,
    component_keys,
    load_experiment,
    merge_settings,
    read_yaml,
    resolve,
    to_plain,
    to_yaml,
)
from moebench.errors import UsageError
from moebench.models.plan import plan_blocks
from moebench.yaml_text import parse_yaml


def message_of(raw: Mapping[str, Any]) -> str:
    """Resolve what cannot be resolved; the error is one line."""
    with pytest.raises(UsageError) as caught:
        plan_blocks(resolve(raw))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("raw", "parts"),
    [
        ({"trian": {}}, ["trian: the top level has no key 'trian'.", "Did you mean 'train'?", "Allowed: ", "seed"]),
        (
            {"train": {"stpes": 3}},
            ["train.stpes: train has no key 'stpes'.", "Did you mean 'steps'?", "Allowed: ", "learning_rate"],
        ),
        (
            {"router": {"name": "switch", "top_k": 2}},
            [
                "router.top_k: router 'switch' has no key 'top_k'.",
                "Allowed: dropout, exploration, jitter, losses, name",
            ],
        ),
        (
            {"layout": {"num_exprts": 4}},
            ["layout.num_exprts: layout 'every_n' has no key", "Did you mean 'num_experts'?"],
        ),
        ({"task": {"data": {"pth": "x"}}}, ["task.data.pth: ", "Did you mean 'path'?", "Allowed: "]),
        (
            {"router": "swich"},
            ["router.name: 'swich' is unknown.", "Did you mean 'switch'?", "Allowed: act, all_experts"],
        ),
        ({"router": {"name": 3}}, ["router.name: '3' is unknown."]),
        ({"router": 3}, ["router: must be a name or a mapping with a name, got 3"]),
        ({"train": {"steps": "many"}}, ["train.steps: ", "many", "a whole number"]),
        ({"train": {"steps": 1.5}}, ["train.steps: ", "1.5", "a whole number"]),
        ({"train": {"steps": [3]}}, ["train.steps: "]),
        ({"train": {"steps": None}}, ["train.steps: "]),
        ({"train": 7}, ["train"]),
        ({"train": {"compile": True, "tf32": True}}, ["train.tf32", "true", "false with train.compile=true"]),
        ({"train": {"precision": "fp8"}}, ["train.precision: ", "fp8", "fp32", "bf16"]),
        ({"model": {"activation": "relu"}}, ["model.activation: ", "relu", "gelu", "swiglu"]),
        ({"router": {"losses": {"z": "big"}}}, ["router.losses.z: ", "big", "a number"]),
        ({"train": {"steps": 0}}, ["train.steps must be at least 1, got 0"]),
        ({"train": {"learning_rate": 0}}, ["train.learning_rate must be greater than 0 and finite, got 0"]),
        ({"train": {"learning_rate": float("nan")}}, ["train.learning_rate must be greater than 0", "got nan"]),
        ({"train": {"beta2": 1}}, ["train.beta2 must be at least 0 and below 1, got 1"]),
        ({"train": {"warmup_steps": -1}}, ["train.warmup_steps must be at least 0, got -1"]),
        ({"train": {"final_rate": 2}}, ["train.final_rate must be between 0 and 1, got 2"]),
        ({"model": {"num_heads": 5}}, ["model.num_heads must be a divisor of d_model=64", "got 5"]),
        ({"model": {"d_model": 12, "num_heads": 4}}, ["model.num_heads must be", "even quotient, got 4"]),
        ({"seed": -1}, ["seed must be at least 0 and below 2^31, got -1"]),
        ({"layout": {"num_experts": 0}}, ["layout.num_experts must be at least 1, got 0"]),
        ({"layout": {"capacity_factor_train": 0}}, ["layout.capacity_factor_train must be greater than 0", "got 0"]),
        (
            {"layout": {"capacity_factor_eval": float("nan")}},
            ["layout.capacity_factor_eval must be greater than 0", "got nan"],
        ),
        ({"layout": {"drop_order": "scores"}}, ["layout.drop_order: ", "scores", "position"]),
        ({"layout": {"n": 0}}, ["layout.n must be at least 1, got 0"]),
        ({"task": {"sequence_length": 1}}, ["task.sequence_length must be at least 2, got 1"]),
        (
            {"router": {"name": "top_k", "top_k": 17}},
            ["router.top_k=17 does not fit layout.num_experts=16 (allowed: 2 to 16)"],
        ),
        ({"router": {"name": "top_k", "top_k": 1}}, ["router.top_k=1 does not fit", "allowed: 2 to 16", "switch"]),
        ({"router": {"name": "noisy_top_k", "top_k": 1}}, ["router.top_k=1 does not fit", "the router learns nothing"]),
        ({"router": {"name": "expert_choice", "average_experts": 0}}, ["router.average_experts=0", "1 to 16"]),
        (
            {"router": {"losses": {"load_balanc": 1}}},
            ["router.losses: 'load_balanc' is unknown.", "Did you mean 'load_balance'?", "Allowed: "],
        ),
        ({"router": {"losses": {"z": -1}}}, ["router.losses.z must be at least 0, got -1"]),
        ({"router": {"losses": {"z": float("nan")}}}, ["router.losses.z must be at least 0, got nan"]),
        ({"router": {"name": "switch", "jitter": -0.1}}, ["router.jitter", "-0.1"]),
        ({"router": {"name": "switch", "jitter": 1.5}}, ["router.jitter", "1.5"]),
        ({"router": {"name": "gshard", "threshold": 0}}, ["router.threshold", "0"]),
        ({"model": {"rope_theta": 0}}, ["model.rope_theta", "0"]),
        ({"train": {"learning_rate": float("inf")}}, ["train.learning_rate", "inf"]),
    ],
    ids=lambda value: re.sub(r"[^a-z0-9_.-]+", " ", json.dumps(value)) if isinstance(value, dict) else "",
)
def test_mistakes_are_reported_in_one_line(raw: Mapping[str, Any], parts: list[str]) -> None:
    message = message_of(raw)
    for part in parts:
        assert part in message


def test_defaults_make_a_cell() -> None:
    config = resolve({})
    assert (config.task.name, config.layout.name, config.router.name) == ("language", "every_n", "switch")
    assert config == resolve({"router": "switch"}) == resolve({"router": {"name": "switch"}})


def test_configuration_is_frozen() -> None:
    config = resolve({})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.steps = 3  # type: ignore[misc]


@parametrize_pairs(each_family=False)
def test_yaml_round_trip(router: str, layout: str) -> None:
    config = resolve({"router": router, "layout": layout, "train": {"learning_rate": 1e-4}, "seed": 7})
    text = to_yaml(config)
    again = resolve(parse_yaml(text))
    assert again == config
    assert to_yaml(again) == text
    assert resolve(to_plain(config)) == config
    json.dumps(to_plain(config))


def test_component_fields_are_the_options() -> None:
    assert component_keys("router", "switch") == {"name", "exploration", "jitter", "dropout", "losses"}


def test_layer_over_drops_the_options_of_a_renamed_component() -> None:
    lower = {"router": {"name": "top_k", "top_k": 4}, "layout": {"num_experts": 4}, "train": {"steps": 3}}
    assert merge_settings(lower, {"router": "switch"}) == {**lower, "router": {"name": "switch"}}
    assert merge_settings(lower, {"router": {"name": "switch", "jitter": 0.0}})["router"] == {
        "name": "switch",
        "jitter": 0.0,
    }


def test_layer_over_keeps_the_options_of_the_same_component() -> None:
    lower = {"router": {"name": "top_k", "top_k": 4}, "train": {"steps": 3, "seed": 1}}
    for upper in ({"router": "top_k"}, {"router": {"name": "top_k"}}, {}):
        assert merge_settings(lower, upper)["router"] == {"name": "top_k", "top_k": 4}
    merged = merge_settings(lower, {"router": {"top_k": 8}, "train": {"steps": 5}})
    assert merged == {"router": {"name": "top_k", "top_k": 8}, "train": {"steps": 5, "seed": 1}}
    assert lower == {"router": {"name": "top_k", "top_k": 4}, "train": {"steps": 3, "seed": 1}}


def test_experiment_file_and_overrides(tmp_path: Path) -> None:
    file = tmp_path / "e.yaml"
    file.write_text("question: Which?\nbase: {train: {steps: 5}}\ngrid: {router: [switch, hash]}\nseeds: [0, 1]\n")
    experiment, cell = load_experiment(file, ["seeds=[4]", "router.top_k=2", "base.seed=3"])
    assert experiment.seeds == [4]
    assert experiment.grid == {"router": ["switch", "hash"]}
    assert cell == {"router": {"top_k": "2"}, "seed": "3"}  # typed by the cell that they are given to


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("gird: {}\n", ["gird: the top level has no key 'gird'.", "Did you mean 'grid'?", "baseline"]),
        ("seeds: []\n", ["seeds must be a list with at least one seed, got []"]),
        ("seeds: [1, 1]\n", ["seeds must be a list that names each seed once, got [1, 1]"]),
        ("seeds: [one]\n", ["seeds[0]: ", "one"]),
        ("grid: {router: []}\n", ["grid.router must be a list with at least one value, got []"]),
        ("grid: {router: switch}\n", ["grid.router: "]),
        ("seeds: [1\n", ["not readable as YAML: "]),
        ("seeds: [1]\nseeds: [2]\n", ["not readable as YAML: ", "seeds"]),
        ("- a\n", ["must be a mapping with keys such as base"]),
    ],
)
def test_mistakes_in_a_file_are_reported_in_one_line(tmp_path: Path, text: str, parts: list[str]) -> None:
    file = tmp_path / "e.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_experiment(file)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_files_that_cannot_be_read_as_yaml_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        read_yaml(tmp_path / "missing.yaml")
    with pytest.raises(UsageError, match="is a folder"):
        read_yaml(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not readable as YAML"):
        read_yaml(tmp_path / "binary.yaml")


@pytest.mark.parametrize("override", ["steps", "=3", "train.steps 3"])
def test_override_without_a_value_is_refused(tmp_path: Path, override: str) -> None:
    file = tmp_path / "e.yaml"
    file.write_text("question: Which?\n")
    experiment, _ = load_experiment(file)
    with pytest.raises(UsageError, match="is not of the form key=value"):
        apply_overrides(experiment, [override])
