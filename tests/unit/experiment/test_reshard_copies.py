"""What --reshard copies: the files that valid manifests list, and nothing that a crafted folder has beside them."""

import os
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from support.hostile_checkpoint import sign
from support.run_folders import write_cell

from moebench.errors import UsageError
from moebench.experiment import reshard
from moebench.experiment.reshard import _copy
from moebench.parallel.checkpoint import VerifiedCheckpointIO, checkpoint_path, find_damage
from moebench.parallel.manifest import Manifest, list_manifests
from moebench.runs.folder import RunFolder
from moebench.runs.journal import Journal


@pytest.fixture
def twin(tmp_path: Path) -> RunFolder:
    """A run with checkpoints of the steps 2 and 4."""
    folder = RunFolder(tmp_path / "runs" / "aaaa")
    write_cell(folder.path)
    with Journal(folder.journal) as journal:
        for step in range(1, 5):
            journal.append(step, {"loss/task": 1 / step})
    for step in (2, 4):
        content = {"step": step, "state_dict": {"w": torch.ones(3)}, "optimizer_states": [{"state.w": torch.ones(3)}]}
        VerifiedCheckpointIO().save_checkpoint(content, checkpoint_path(folder.checkpoints, step), {"cell": "aaaa"})
    return folder


@pytest.fixture
def target(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "bbbb")


def test_copies_are_checkpoints_of_the_new_cell(twin: RunFolder, target: RunFolder) -> None:
    assert _copy(twin, target) == 2
    assert target.journal.read_bytes() == twin.journal.read_bytes()
    for path in list_manifests(target.checkpoints):
        assert (find_damage(path), Manifest.read(path).cell) == (None, "bbbb")


def test_a_damaged_checkpoint_and_files_that_no_manifest_lists_are_left(twin: RunFolder, target: RunFolder) -> None:
    (twin.checkpoints / "step_0000002.json").write_text("[" * 10_000)
    (twin.checkpoints / "large").write_bytes(b"x" * 1000)
    os.mkfifo(twin.checkpoints / "pipe")
    assert _copy(twin, target) == 1
    assert sorted(path.name for path in target.checkpoints.iterdir()) == [
        "kept",
        "step_0000004.ckpt",
        "step_0000004.json",
    ]


def test_a_pipe_in_a_checkpoint_is_damage(twin: RunFolder, target: RunFolder) -> None:
    for step in (2, 4):
        file = checkpoint_path(twin.checkpoints, step) / "rest.pt"
        file.unlink()
        os.mkfifo(file)
    assert _copy(twin, target) == 0
    assert not target.checkpoints.exists()
    assert not list(target.path.glob(".reshard*"))


def test_a_link_is_refused(twin: RunFolder, target: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("hunter2")
    checkpoint = checkpoint_path(twin.checkpoints, 4)
    sign(checkpoint)
    (checkpoint / "rest.pt").unlink()
    (checkpoint / "rest.pt").symlink_to(tmp_path / "secret")
    with pytest.raises(UsageError, match=r"rest\.pt: is a symbolic link"):
        _copy(twin, target)
    assert not [path for path in target.path.rglob("*") if path.is_file() and path.name != ".lock"]


def test_a_disk_that_is_too_small_is_refused(
    twin: RunFolder, target: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(1000, 0, 1000)
    monkeypatch.setattr(reshard.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UsageError, match=r"--reshard: .* GiB for copies of checkpoints, 0.00 are free"):
        _copy(twin, target)
    assert not target.checkpoints.exists()


def test_kept_weights_are_copied_and_damaged_ones_left(twin: RunFolder, target: RunFolder) -> None:
    for step in (1, 3):
        path = checkpoint_path(twin.kept_weights, step)
        VerifiedCheckpointIO().save_weights({"w": torch.ones(3)}, path, {"cell": "aaaa"})
    (checkpoint_path(twin.kept_weights, 3) / ".metadata").write_bytes(b"damaged")
    assert _copy(twin, target) == 2
    (kept,) = list_manifests(target.kept_weights)
    assert (kept.stem, find_damage(kept), Manifest.read(kept).cell) == ("step_0000001", None, "bbbb")
