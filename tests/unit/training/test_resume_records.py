"""A run resumes only from a checkpoint whose journal and loads are complete, and equals an uninterrupted run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.training_cases import Run, assert_same_runs, tiny_config, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def drop_lines(*numbers: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "journal.jsonl"
        lines = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(b"".join(line for number, line in enumerate(lines) if number not in numbers))

    return damage


def change_digit(folder: Path) -> None:
    file = folder / "journal.jsonl"
    file.write_bytes(file.read_bytes().replace(b'"loss/task": 5', b'"loss/task": 4', 1))


def damage_byte_1(folder: Path) -> None:
    file = folder / "journal.jsonl"
    file.write_bytes(b"#" + file.read_bytes()[1:])


@pytest.mark.parametrize(
    ("damage", "name", "first_step"),
    [
        (lambda folder: (folder / "journal.jsonl").unlink(), "journal.jsonl", 0),
        (lambda folder: (folder / "journal.jsonl").write_bytes(b""), "journal.jsonl", 0),
        (drop_lines(0), "journal.jsonl", 0),
        (drop_lines(2), "journal.jsonl", 0),
        (drop_lines(5, 6), "journal.jsonl", 3),  # points of steps 4 to 6: the checkpoint of step 3 is complete
        (damage_byte_1, "journal.jsonl", 0),
        (change_digit, "journal.jsonl", 0),
        (lambda folder: (folder / "load.jsonl").unlink(), "load.jsonl", 3),
        (lambda folder: (folder / "load.jsonl").write_text("x\n"), "load.jsonl", 3),
        (lambda folder: (folder / "layers.jsonl").unlink(), "layers.jsonl", 0),
        (lambda folder: (folder / "layers.jsonl").write_text("x\n"), "layers.jsonl", 0),
    ],
)
def test_missing_points_are_trained_again(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage, name: str, first_step: int
) -> None:
    config = tiny_config(text, train={"checkpoint_every": 3, "eval_every": 5})
    full, parts = Run(config, tmp_path / "full"), Run(config, tmp_path / "parts")
    full()
    parts(stop_at=6)
    damage(parts.folder)
    capsys.readouterr()
    steps: list[int] = []
    parts.progress = lambda message: steps.append(message["step"])
    parts()
    notes = capsys.readouterr().out
    assert f"{name} does not have what it had when the checkpoint was written" in notes
    assert ("training starts at step 0" in notes) is (first_step == 0)
    assert steps[0] == first_step + 1
    assert_same_runs(full, parts)
    assert full.loads == parts.loads
    assert (full.folder / "layers.jsonl").read_text() == (parts.folder / "layers.jsonl").read_text()


def test_a_checkpoint_of_another_cell_is_not_loaded(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(text, train={"checkpoint_every": 3})
    full, parts = Run(config, tmp_path / "full"), Run(config, tmp_path / "parts")
    full()
    parts(stop_at=6)
    manifests = [path for path in parts.checkpoints.iterdir() if path.suffix == ".json"]
    for path in manifests:
        text_of_manifest = path.read_text()
        path.write_text(text_of_manifest.replace('"cell": "000000000000"', '"cell": "111111111111"'))
        assert path.read_text() != text_of_manifest
    parts()
    assert "training starts at step 0" in capsys.readouterr().out
    assert_same_runs(full, parts)


def test_manifests_of_earlier_versions_are_resumed_from(text: Path, tmp_path: Path) -> None:
    config = tiny_config(text, train={"checkpoint_every": 3})
    full, parts = Run(config, tmp_path / "full"), Run(config, tmp_path / "parts")
    full()
    parts(stop_at=6)
    for path in parts.checkpoints.glob("*.json"):
        values = json.loads(path.read_text())
        path.write_text(json.dumps({key: values[key] for key in ("step", "sha256", "bytes")}))
    steps: list[int] = []
    parts.progress = lambda message: steps.append(message["step"])
    parts()
    assert steps[0] == 7
    assert_same_runs(full, parts)


def test_the_copy_of_a_run_folder_resumes(text: Path, tmp_path: Path) -> None:
    config = tiny_config(text, train={"checkpoint_every": 3})
    parts = Run(config, tmp_path / "parts")
    parts(stop_at=6)
    shutil.copytree(parts.folder, tmp_path / "copy")
    steps: list[int] = []
    copy = Run(config, tmp_path / "copy", progress=lambda message: steps.append(message["step"]))
    copy()
    assert steps[0] == 7
