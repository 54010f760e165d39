"""The section `init`: what it accepts, and its part in the id of a cell."""

from dataclasses import replace
from typing import Any

import pytest

from moebench.config import cell_id, flatten, load_experiment, resolve, to_plain
from moebench.errors import UsageError
from moebench.init_config import Parent


def test_a_cell_without_a_parent_keeps_its_id() -> None:
    """The id of the default cell, from the version before there were parents."""
    assert cell_id(resolve({}), "x") == "4462181efc28"


def test_the_key_is_from_and_survives_a_file() -> None:
    config = resolve({"init": {"from": "run:0123456789ab@30", "upcycle": {"copies": 2}}})
    assert config.init.parents == (Parent(kind="run", name="0123456789ab", step=30),)
    assert config.init.upcycle.copies == 2
    assert dict(flatten(to_plain(config)))["init.from"] == "run:0123456789ab@30"
    assert resolve(to_plain(config)) == config


@pytest.mark.parametrize(
    ("text", "parent"),
    [
        ("hf:some folder/x", Parent(kind="hf", name="some folder/x")),
        ("stage:train", Parent(kind="stage", name="train")),
        ("stage:train/router=dense, k=1", Parent(kind="stage", name="train", label="router=dense, k=1")),
        ("run:ab", Parent(kind="run", name="ab")),
    ],
)
def test_parents_are_parsed(text: str, parent: Parent) -> None:
    assert Parent.parse(text) == parent
    assert str(parent) == text


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ({"from": "model.safetensors"}, "init.from: 'model.safetensors' names no weights (allowed: null, run:ID"),
        ({"from": "run:../../x"}, "init.from: 'run:../../x' names no run (allowed: run: and 1 to 12 hexadecimal"),
        ({"from": "run:ab@0"}, "init.from: 'run:ab@0' names no run"),
        ({"from": "hf:"}, "init.from: 'hf:' names no weights"),
        ({"from_": "run:ab"}, "init.from_: init has no key 'from_'. Did you mean 'from'?"),
        ({"upcycle": {"copies": 0}}, "init.upcycle.copies must be all, or a number of experts, at least 1, got 0"),
        ({"upcycle": {"drop": 1.5}}, "init.upcycle.drop must be between 0 and 1, got 1.5"),
        ({"upcycle": {"noise": -1}}, "init.upcycle.noise must be at least 0"),
        ({"upcycle": {"router": "coyp"}}, "init.upcycle.router: 'coyp' was given. Did you mean 'copy'?"),
        ({"digest": "ab"}, "init.digest must be 64 hexadecimal digits, or null, got ab"),
    ],
)
def test_other_values_are_refused_in_one_line(init: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        resolve({"init": init})
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_the_id_has_the_parent_and_not_the_path_of_a_folder() -> None:
    def compute_id(**init: Any) -> str:
        return cell_id(resolve({"init": init}), "x")

    digests = "a" * 64, "b" * 64
    ids = [compute_id(**{"from": "run:0123456789ab"}), compute_id(**{"from": "run:0123456789ab@3"})]
    ids += [compute_id(**{"from": "hf:here", "digest": digest}) for digest in digests]
    assert len({*ids, compute_id()}) == 5
    assert compute_id(**{"from": "hf:here", "digest": digests[0]}) == compute_id(
        **{"from": "hf:there", "digest": digests[0]}
    )


def test_what_is_trainable_is_part_of_the_id() -> None:
    config = resolve({})
    frozen = replace(config, train=replace(config.train, trainable="experts"))
    assert cell_id(frozen, "x") != cell_id(config, "x")
    with pytest.raises(UsageError, match=r"train.trainable must be another value where init.from is null"):
        resolve({"train": {"trainable": "new_experts"}})


def test_an_override_names_the_parent(tmp_path: Any) -> None:
    file = tmp_path / "e.yaml"
    file.write_text("base: {router: dense}\n")
    assert load_experiment(file, ["init.from=run:ab"])[1] == {"init": {"from": "run:ab"}}
