"""What a checkpoint's manifest must say for the checkpoint to be used."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moebench.parallel.checkpoint import VerifiedCheckpointIO, checkpoint_path, find_newest_valid
from moebench.parallel.manifest import Manifest, RecordPrefix, list_manifests

Values = dict[str, Any]


def save(folder: Path, *steps: int) -> None:
    for step in steps:
        weights = torch.full((4,), float(step))
        content = {"state_dict": {"w": weights}, "optimizer_states": [{"state.w": weights}]}
        fields = {"cell": "abc", "records": {"journal.jsonl": {"bytes": 7, "sha256": "0" * 64}}}
        VerifiedCheckpointIO().save_checkpoint(content, checkpoint_path(folder, step), fields)


def drop(values: Values, name: str) -> Values:
    return values | {"sha256": {key: digest for key, digest in values["sha256"].items() if key != name}}


def test_a_manifest_is_read_back(tmp_path: Path) -> None:
    save(tmp_path, 5)
    manifest = Manifest.read(tmp_path / "step_0000005.json")
    assert (manifest.step, manifest.cell) == (5, "abc")
    assert sorted(manifest.sha256) == [".metadata", "__0_0.distcp", "rest.pt"]
    assert manifest.records == {"journal.jsonl": RecordPrefix(bytes=7, sha256="0" * 64)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda values: [], "no list of checksums"),
        (lambda values: 3, "no list of checksums"),
        (lambda values: values | {"sha256": []}, "no list of checksums"),
        (lambda values: values | {"sha256": {}}, ".metadata is not in its manifest"),
        (lambda values: drop(values, "rest.pt"), "rest.pt is not in its manifest"),
        (lambda values: drop(values, ".metadata"), ".metadata is not in its manifest"),
        (lambda values: drop(values, "__0_0.distcp"), "__0_0.distcp is not in its manifest"),
        (lambda values: values | {"sha256": {**values["sha256"], "a": "0" * 64}}, "a is missing"),
        (lambda values: values | {"sha256": {**values["sha256"], "../a": "0" * 64}}, "no list of checksums"),
        (lambda values: values | {"step": 5}, "the checkpoint of step 5, under another name"),
        (lambda values: values | {"records": []}, "damaged cell or records"),
        (lambda values: values | {"records": {"journal.jsonl": {"bytes": "x"}}}, "damaged record"),
    ],
)
def test_a_manifest_that_is_not_of_its_checkpoint(
    tmp_path: Path, change: Callable[[Values], object], reason: str
) -> None:
    save(tmp_path, 5, 10)
    file = tmp_path / "step_0000010.json"
    values = {key: value for key, value in json.loads(file.read_text()).items() if key != "checksum"}
    file.write_text(json.dumps(change(values)))
    checkpoint, damaged = find_newest_valid(tmp_path)
    assert checkpoint == checkpoint_path(tmp_path, 5)
    (line,) = damaged
    assert line.startswith("step_0000010.ckpt: damaged (")
    assert reason in line
    assert line.endswith("; the one before is used")


def test_every_flipped_bit_of_a_manifest_is_noticed(tmp_path: Path) -> None:
    save(tmp_path, 5, 10)
    file = tmp_path / "step_0000010.json"
    content = file.read_bytes()
    for place in range(0, len(content), 7):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert find_newest_valid(tmp_path)[0] == checkpoint_path(tmp_path, 5), place


def test_a_renamed_checkpoint_is_not_used(tmp_path: Path) -> None:
    save(tmp_path, 5, 10)
    for suffix in ("ckpt", "json"):
        (tmp_path / f"step_0000010.{suffix}").rename(tmp_path / f"step_0000020.{suffix}")
    checkpoint, (line,) = find_newest_valid(tmp_path)
    assert checkpoint == checkpoint_path(tmp_path, 5)
    assert "it is the checkpoint of step 10, under another name" in line


def test_files_with_other_names_are_ignored(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (tmp_path / "step_abc.json").write_text("{}")
    (tmp_path / "step_.json").write_text("{}")
    assert [path.name for path in list_manifests(tmp_path)] == ["step_0000005.json"]
    assert find_newest_valid(tmp_path) == (checkpoint_path(tmp_path, 5), [])


def test_a_folder_in_place_of_a_manifest_and_a_file_in_place_of_a_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (tmp_path / "step_0000010.json").mkdir()
    (tmp_path / "step_0000010.ckpt").write_text("")
    assert find_newest_valid(tmp_path)[0] == checkpoint_path(tmp_path, 5)
    save(tmp_path, 10)  # takes their place
    assert find_newest_valid(tmp_path) == (checkpoint_path(tmp_path, 10), [])


def test_without_a_valid_checkpoint_the_line_says_so(tmp_path: Path) -> None:
    save(tmp_path, 5)
    shutil.rmtree(checkpoint_path(tmp_path, 5))
    checkpoint, (line,) = find_newest_valid(tmp_path)
    assert checkpoint is None
    assert line.endswith("; there is no valid one before")
