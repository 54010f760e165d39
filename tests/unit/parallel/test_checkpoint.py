import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training_cases import Run, assert_same_tree, tiny_config, write_text

from moebench.parallel.checkpoint import KEEP, VerifiedCheckpointIO, checkpoint_path, find_newest_valid, parse_step


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
    rest = VerifiedCheckpointIO().load_into(state, path)
    return state | rest


def tear(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def empty(file: Path) -> None:
    file.write_bytes(b"")


def damages() -> list:
    return [
        pytest.param(damage, name, id=f"{damage.__name__} {name}")
        for name in ("", "ckpt/.metadata", "ckpt/__0_0.distcp", "ckpt/rest.pt", "json")
        for damage in ((tear, flip, empty, Path.unlink) if name else (shutil.rmtree,))
    ]


def part_of(path: Path, name: str) -> Path:
    """Return a file of a checkpoint, its manifest, or (for no name) its folder."""
    suffix, _, file = name.partition("/")
    return path.with_suffix(f".{suffix}") / file if file else path.with_suffix(f".{suffix or 'ckpt'}")


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    save(tmp_path, 3)
    file, damaged = find_newest_valid(tmp_path)
    assert file == checkpoint_path(tmp_path, 3)
    assert parse_step(file) == 3
    assert damaged == []
    assert_same_tree(read(file), content(3))


def test_newest_is_found_by_number_not_by_name(tmp_path: Path) -> None:
    save(tmp_path, 9_999_999, 10_000_000)
    assert find_newest_valid(tmp_path)[0] == checkpoint_path(tmp_path, 10_000_000)


def test_nothing_saved_is_no_checkpoint(tmp_path: Path) -> None:
    assert find_newest_valid(tmp_path / "missing") == (None, [])


@pytest.mark.parametrize(("damage", "name"), damages())
def test_damaged_checkpoint_falls_back_and_says_so(tmp_path: Path, damage, name: str) -> None:
    save(tmp_path, 5, 10)
    damage(part_of(checkpoint_path(tmp_path, 10), name))
    file, damaged = find_newest_valid(tmp_path)
    assert file == checkpoint_path(tmp_path, 5)
    if name == "json" and damage is Path.unlink:
        return  # died between the checkpoint and its manifest: it never counted
    assert len(damaged) == 1
    assert damaged[0].startswith("step_0000010.ckpt: ")
    assert "the one before is used" in damaged[0]
    assert "\n" not in damaged[0]


def test_all_damaged_means_from_the_start(tmp_path: Path) -> None:
    save(tmp_path, 5, 10)
    for step in (5, 10):
        flip(checkpoint_path(tmp_path, step) / "__0_0.distcp")
    file, damaged = find_newest_valid(tmp_path)
    assert file is None
    assert len(damaged) == 2


def test_two_are_kept_and_nothing_else_is_left(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 10)
    assert KEEP == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step_0000003.ckpt",
        "step_0000003.json",
        "step_0000010.ckpt",
        "step_0000010.json",
    ]


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(Exception, match="pickle"):
        VerifiedCheckpointIO().save_checkpoint(content(2) | {"bad": lambda: None}, checkpoint_path(tmp_path, 2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_0000001.ckpt", "step_0000001.json"]
    assert find_newest_valid(tmp_path)[0] == checkpoint_path(tmp_path, 1)


class Trap:
    """What would print when it is unpickled."""

    def __reduce__(self):
        return (print, ("this must not run",))


def test_checkpoint_does_not_run_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 1, 2)
    torch.save({"x": Trap()}, checkpoint_path(tmp_path, 1) / "rest.pt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        read(checkpoint_path(tmp_path, 1))
    (checkpoint_path(tmp_path, 2) / ".metadata").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(Exception, match=r"must not name builtins\.print"):
        read(checkpoint_path(tmp_path, 2))
    assert "this must not run" not in capsys.readouterr().out


@pytest.mark.parametrize(("damage", "name"), damages())
def test_run_goes_on_from_the_one_before(text: Path, tmp_path: Path, capsys, damage, name: str) -> None:
    config = tiny_config(text, train={"checkpoint_every": 3})
    whole, parts = Run(config, tmp_path / "whole"), Run(config, tmp_path / "parts")
    whole()
    parts(stop_at=6)
    damage(part_of(parts.checkpoints / "step_0000006.ckpt", name))
    capsys.readouterr()
    parts()
    said = "step_0000006.ckpt" in capsys.readouterr().out
    assert said is not (name == "json" and damage is Path.unlink)
    assert_same_tree(whole.checkpoint(12)["state_dict"], parts.checkpoint(12)["state_dict"])
    assert whole.points() == parts.points()
    assert not [path for path in parts.checkpoints.iterdir() if path.name.startswith(".")]


def test_damaged_checkpoints_do_not_push_out_good_ones(text: Path, tmp_path: Path) -> None:
    # Both checkpoints are damaged and the run starts again; what it saves then must survive the next stop.
    config = tiny_config(text, train={"checkpoint_every": 4})
    run = Run(config, tmp_path / "run")
    run(stop_at=9)
    for step in (8, 9):
        flip(checkpoint_path(run.checkpoints, step) / "__0_0.distcp")
    run.step = 0
    assert run(stop_at=5) is None
    assert find_newest_valid(run.checkpoints)[0] == checkpoint_path(run.checkpoints, 5)


def test_orphans_of_a_killed_write_are_cleared(text: Path, tmp_path: Path) -> None:
    run = Run(tiny_config(text), tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    (run.checkpoints / ".step_0000003.ckpt.4242.tmp").write_bytes(b"half")
    run()
    assert not [path for path in run.checkpoints.iterdir() if path.name.endswith(".tmp")]
