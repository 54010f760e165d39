import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training_cases import Run, assert_same_tree, tiny_config, write_text

from moebench.parallel.checkpoint import KEEP, VerifiedCheckpointIO, checkpoint_path, find_newest_valid
from moebench.parallel.manifest import parse_step


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


def save(folder: Path, *steps: int) -> None:
    """Save a small checkpoint for each step."""
    for step in steps:
        VerifiedCheckpointIO().save_checkpoint(content(step), checkpoint_path(folder, step))


def content(step: int) -> dict[str, Any]:
    weights = torch.full((100,), float(step))
    return {"step": step, "state_dict": {"w": weights}, "optimizer_states": [{"state.w": -weights, "lr.w": 0.1 * step}]}


def read(path: Path) -> dict[str, Any]:
    state = content(0)
    other_state = VerifiedCheckpointIO().load_into(state, path)
    return state | other_state


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def empty(file: Path) -> None:
    file.write_bytes(b"")


def list_damages() -> list:
    return [
        pytest.param(damage, name, id=f"{damage.__name__} {name}")
        for name in ("", "ckpt/.metadata", "ckpt/__0_0.distcp", "ckpt/rest.pt", "json")
        for damage in ((truncate, flip_bit, empty, Path.unlink) if name else (shutil.rmtree,))
    ]


def file_of(path: Path, name: str) -> Path:
    """Return the path of a file of a checkpoint, of its manifest, or of its folder (for an empty name)."""
    suffix, _, file = name.partition("/")
    return path.with_suffix(f".{suffix}") / file if file else path.with_suffix(f".{suffix or 'ckpt'}")


def test_saved_checkpoint_is_read_back(tmp_path: Path) -> None:
    save(tmp_path, 3)
    file, damaged = find_newest_valid(tmp_path)
    assert file == checkpoint_path(tmp_path, 3)
    assert parse_step(file) == 3
    assert damaged == []
    assert_same_tree(read(file), content(3))


def test_newest_checkpoint_is_that_of_the_highest_step(tmp_path: Path) -> None:
    save(tmp_path, 9_999_999, 10_000_000)
    assert find_newest_valid(tmp_path)[0] == checkpoint_path(tmp_path, 10_000_000)


def test_missing_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert find_newest_valid(tmp_path / "missing") == (None, [])


@pytest.mark.parametrize(("damage", "name"), list_damages())
def test_damaged_checkpoint_is_reported_and_passed_over(tmp_path: Path, damage, name: str) -> None:
    save(tmp_path, 5, 10)
    damage(file_of(checkpoint_path(tmp_path, 10), name))
    file, damaged = find_newest_valid(tmp_path)
    assert file == checkpoint_path(tmp_path, 5)
    if name == "json" and damage is Path.unlink:
        return  # as if killed before the manifest was written: the checkpoint does not count
    assert len(damaged) == 1
    assert damaged[0].startswith("step_0000010.ckpt: ")
    assert "the one before is used" in damaged[0]
    assert "\n" not in damaged[0]


def test_no_checkpoint_is_found_if_all_are_damaged(tmp_path: Path) -> None:
    save(tmp_path, 5, 10)
    for step in (5, 10):
        flip_bit(checkpoint_path(tmp_path, step) / "__0_0.distcp")
    file, damaged = find_newest_valid(tmp_path)
    assert file is None
    assert len(damaged) == 2


def test_two_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 10)
    assert KEEP == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step_0000003.ckpt",
        "step_0000003.json",
        "step_0000010.ckpt",
        "step_0000010.json",
    ]


def test_failed_save_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(Exception, match="pickle"):
        VerifiedCheckpointIO().save_checkpoint(content(2) | {"bad": lambda: None}, checkpoint_path(tmp_path, 2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_0000001.ckpt", "step_0000001.json"]
    assert find_newest_valid(tmp_path)[0] == checkpoint_path(tmp_path, 1)


@pytest.fixture(scope="module")
def stopped(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """A run trained to the end, and the same run stopped after its second checkpoint: for copies."""
    folder = tmp_path_factory.mktemp("stopped")
    config = tiny_config(text, train={"checkpoint_every": 3})
    full, parts = Run(config, folder / "full"), Run(config, folder / "parts")
    full()
    parts(stop_at=6)
    return full, parts


def list_damages_of_runs() -> list:
    """Return one damage of each file and of the folder, and all others for `make test-all`."""
    first = {"": shutil.rmtree, "ckpt/.metadata": flip_bit, "ckpt/__0_0.distcp": flip_bit, "ckpt/rest.pt": truncate}
    first |= {"json": Path.unlink}
    return [
        each
        if first[each.values[1]] is each.values[0]
        else pytest.param(*each.values, id=each.id, marks=pytest.mark.slow)
        for each in list_damages()
    ]


@pytest.mark.parametrize(("damage", "name"), list_damages_of_runs())
def test_run_resumes_from_the_previous_checkpoint(
    stopped: tuple[Run, Run], tmp_path: Path, capsys, damage, name: str
) -> None:
    full, original = stopped
    parts = Run(original.config, tmp_path / "parts")
    shutil.copytree(original.folder, parts.folder)
    damage(file_of(parts.checkpoints / "step_0000006.ckpt", name))
    capsys.readouterr()
    parts()
    is_reported = "step_0000006.ckpt" in capsys.readouterr().out
    assert is_reported is not (name == "json" and damage is Path.unlink)
    assert_same_tree(full.checkpoint(12)["state_dict"], parts.checkpoint(12)["state_dict"])
    assert full.points() == parts.points()
    assert not [path for path in parts.checkpoints.iterdir() if path.name.startswith(".")]


def test_damaged_checkpoints_do_not_displace_valid_ones(text: Path, tmp_path: Path) -> None:
    # Both checkpoints are damaged and the run starts anew; its next checkpoints must not be removed as older ones.
    config = tiny_config(text, train={"checkpoint_every": 4})
    run = Run(config, tmp_path / "run")
    run(stop_at=9)
    for step in (8, 9):
        flip_bit(checkpoint_path(run.checkpoints, step) / "__0_0.distcp")
    run.step = 0
    assert run(stop_at=5) is None
    assert find_newest_valid(run.checkpoints)[0] == checkpoint_path(run.checkpoints, 5)


def test_unfinished_checkpoints_of_a_killed_process_are_removed(text: Path, tmp_path: Path) -> None:
    run = Run(tiny_config(text), tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    (run.checkpoints / ".step_0000003.ckpt.4242.tmp").write_bytes(b"half")
    run()
    assert not [path for path in run.checkpoints.iterdir() if path.name.endswith(".tmp")]
