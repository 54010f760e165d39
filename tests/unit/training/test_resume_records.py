"""A run resumes only from a checkpoint whose journal and loads are complete, and equals an uninterrupted run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.training_cases import Run, assert_same_runs, tiny_config, write_text


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """A run trained to the end, and the same run stopped after its second checkpoint: for copies."""
    folder = tmp_path_factory.mktemp("trained")
    config = tiny_config(write_text(tmp_path_factory.mktemp("text")), train={"checkpoint_every": 3, "eval_every": 5})
    full, stopped = Run(config, folder / "full"), Run(config, folder / "stopped")
    full()
    stopped(stop_at=6)
    return full, stopped


@pytest.fixture
def full(trained: tuple[Run, Run]) -> Run:
    return trained[0]


@pytest.fixture
def parts(trained: tuple[Run, Run], tmp_path: Path) -> Run:
    """A copy of the run that was stopped."""
    shutil.copytree(trained[1].folder, tmp_path / "parts")
    return Run(trained[1].config, tmp_path / "parts")


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
        pytest.param(
            lambda folder: (folder / "journal.jsonl").write_bytes(b""), "journal.jsonl", 0, marks=pytest.mark.slow
        ),
        pytest.param(drop_lines(0), "journal.jsonl", 0, marks=pytest.mark.slow),
        pytest.param(drop_lines(2), "journal.jsonl", 0, marks=pytest.mark.slow),
        (drop_lines(5, 6), "journal.jsonl", 3),  # points of steps 4 to 6: the checkpoint of step 3 is complete
        (damage_byte_1, "journal.jsonl", 0),
        pytest.param(change_digit, "journal.jsonl", 0, marks=pytest.mark.slow),
        (lambda folder: (folder / "load.jsonl").unlink(), "load.jsonl", 3),
        pytest.param(lambda folder: (folder / "load.jsonl").write_text("x\n"), "load.jsonl", 3, marks=pytest.mark.slow),
        (lambda folder: (folder / "layers.jsonl").unlink(), "layers.jsonl", 0),
        pytest.param(
            lambda folder: (folder / "layers.jsonl").write_text("x\n"), "layers.jsonl", 0, marks=pytest.mark.slow
        ),
    ],
)
def test_missing_points_are_trained_again(
    full: Run, parts: Run, capsys: pytest.CaptureFixture[str], damage, name: str, first_step: int
) -> None:
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


def test_a_checkpoint_of_another_cell_is_not_loaded(full: Run, parts: Run, capsys: pytest.CaptureFixture[str]) -> None:
    manifests = [path for path in parts.checkpoints.iterdir() if path.suffix == ".json"]
    for path in manifests:
        text_of_manifest = path.read_text()
        path.write_text(text_of_manifest.replace('"cell": "000000000000"', '"cell": "111111111111"'))
        assert path.read_text() != text_of_manifest
    parts()
    assert "training starts at step 0" in capsys.readouterr().out
    assert_same_runs(full, parts)


def test_manifests_of_earlier_versions_are_resumed_from(full: Run, parts: Run) -> None:
    for path in parts.checkpoints.glob("*.json"):
        values = json.loads(path.read_text())
        path.write_text(json.dumps({key: values[key] for key in ("step", "sha256", "bytes")}))
    steps: list[int] = []
    parts.progress = lambda message: steps.append(message["step"])
    parts()
    assert steps[0] == 7
    assert_same_runs(full, parts)


def test_the_copy_of_a_run_folder_resumes(parts: Run, tmp_path: Path) -> None:
    shutil.copytree(parts.folder, tmp_path / "copy")
    steps: list[int] = []
    copy = Run(parts.config, tmp_path / "copy", progress=lambda message: steps.append(message["step"]))
    copy()
    assert steps[0] == 7
