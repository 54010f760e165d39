"""`train.keep_checkpoints`: which steps it names, and that their weights survive a stop, a kill and a rewind."""

from pathlib import Path

import pytest
import torch
from support.training_cases import Run, Watched, assert_same_runs, assert_same_tree, tiny_config, write_text

from moebench.checkpoint_config import parse_kept_steps
from moebench.config import cell_id, resolve, to_plain
from moebench.errors import UsageError
from moebench.parallel.checkpoint import VerifiedCheckpointIO, checkpoint_path
from moebench.parallel.manifest import Manifest
from moebench.runs.folder import RunFolder
from moebench.training.kept_weights import list_kept_weights
from moebench.training.model import build_initialised_model, prepare_task


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def read_weights(run: Run, step: int) -> dict[str, torch.Tensor]:
    """Return the kept weights of a step by name."""
    model = build_initialised_model(run.config, prepare_task(run.config, run.folder))
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    VerifiedCheckpointIO().load_weights(weights, checkpoint_path(run.checkpoints / "kept", step))
    return weights


def test_percentages_are_rounded_to_steps() -> None:
    # 1 % of 600 is 6, 0.25 % is 1.5 and goes up to 2, 0.01 % is at least the first step; 6 occurs twice.
    assert parse_kept_steps(["1%", "0.25%", "0.01 %", 6, "100%"], 600) == [1, 2, 6, 600]
    assert tiny_config(Path("x"), train={"keep_checkpoints": ["50%", "100%"]}).train.kept_steps == [6]


@pytest.mark.parametrize("entry", ["0%", "101%", 0, 13, -1, "half", "nan%", "1e1%", ""])
def test_an_entry_that_is_no_step_is_refused_in_one_line(entry: int | str) -> None:
    with pytest.raises(UsageError, match=r"train.keep_checkpoints: '.*' is none of the 12 steps \(allowed: ") as error:
        tiny_config(Path("x"), train={"keep_checkpoints": [entry]})
    assert "\n" not in str(error.value)


def test_it_is_no_part_of_the_id() -> None:
    plain, kept = (tiny_config(Path("x"), train={"keep_checkpoints": entries}) for entries in ([], ["50%"]))
    assert cell_id(plain, "data") == cell_id(kept, "data")
    assert resolve(to_plain(kept)).train.keep_checkpoints == ["50%"]


def test_weights_of_the_steps_are_kept_and_change_nothing(text: Path, tmp_path: Path) -> None:
    kept = Run(tiny_config(text, train={"keep_checkpoints": [3, "50%"], "checkpoint_every": 2}), tmp_path / "kept")
    plain = Run(tiny_config(text, train={"checkpoint_every": 6}), tmp_path / "plain")
    assert kept() is not None
    assert plain(stop_at=6) is None
    assert sorted(list_manifest_names(kept)) == ["step_0000003.json", "step_0000006.json"]
    assert_same_tree(read_weights(kept, 6), dict(plain.checkpoint(6)["state_dict"]))
    assert not torch.equal(*(read_weights(kept, step)["model.embedding.weight"] for step in (3, 6)))
    assert plain() is not None
    assert_same_runs(plain, kept)
    sizes = [Manifest.read(path).bytes for path in (kept.checkpoints / "kept" / "step_0000006.json",)]
    assert sizes[0] < Manifest.read(kept.checkpoints / "step_0000012.json").bytes / 2


def list_manifest_names(run: Run) -> list[str]:
    return [path.name for path in (run.checkpoints / "kept").glob("*.json")]


def test_a_resumed_run_keeps_the_same_weights(text: Path, tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def kill(message) -> None:
        if message["step"] == 8:
            raise KilledError

    config = tiny_config(text, train={"keep_checkpoints": [2, 5, 7, 10], "checkpoint_every": 4})
    full, parts = Run(config, tmp_path / "full"), Run(config, tmp_path / "parts", progress=kill)
    full()
    with pytest.raises(KilledError):
        parts()
    # Killed at step 8: the run continues from step 4, and what was kept of later steps is written again.
    (parts.checkpoints / "step_0000008.json").unlink()
    (parts.checkpoints / "kept" / "step_0000007.json").unlink()
    (parts.checkpoints / "kept" / "step_0000005.ckpt" / "rest.pt").write_bytes(b"damaged")
    parts.progress = lambda message: None
    parts()
    for step in (2, 5, 7, 10):
        assert_same_tree(read_weights(full, step), read_weights(parts, step))


def test_steps_that_a_run_has_passed_are_named(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The option is no part of the id, so a run that was stopped may continue with it.
    Run(tiny_config(text), tmp_path)(stop_at=5)
    config = tiny_config(text, train={"keep_checkpoints": [2, 4, 8]})
    Run(config, tmp_path)()
    assert "train.keep_checkpoints: no weights of step 2, 4: the run was past it already" in capsys.readouterr().out
    assert [*list_kept_weights(RunFolder(tmp_path))[0]] == []  # of the cell 000000000000, and the folder has another id


def test_a_rewind_writes_the_weights_again(text: Path, tmp_path: Path) -> None:
    train = {"steps": 40, "checkpoint_every": 10, "spike_policy": "rewind", "spike_window": 8, "eval_every": 40}
    config = tiny_config(text, train=train | {"keep_checkpoints": [25]})
    once = Watched(prepare_task(config, tmp_path), lambda loss_BP: loss_BP * 100, at=28)
    run = Run(config, tmp_path, task=once)
    assert run() is not None
    first_batches = Run(tiny_config(text, train=train | {"spike_policy": "record"}), tmp_path / "plain")
    first_batches(stop_at=25)
    # After the rewind to step 20 the batches are other ones than in a run without a spike.
    weights, plain = read_weights(run, 25), first_batches.checkpoint(25)["state_dict"]
    assert not torch.equal(weights["model.embedding.weight"], plain["model.embedding.weight"])


def test_damaged_weights_are_named_and_left_out(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "aaaa")
    for step in (1, 2, 3):
        path = checkpoint_path(folder.kept_weights, step)
        VerifiedCheckpointIO().save_weights({"w": torch.ones(3)}, path, {"cell": "bbbb" if step == 3 else "aaaa"})
    (checkpoint_path(folder.kept_weights, 2) / "rest.pt").write_bytes(b"damaged")
    kept, damaged = list_kept_weights(folder)
    assert [*kept] == [1]
    assert [path.name for path in damaged] == ["step_0000002.ckpt", "step_0000003.ckpt"]
    assert ["checksum" in damage or "of the cell bbbb" in damage for damage in damaged.values()] == [True, True]
