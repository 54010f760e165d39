"""Checkpoints of an attacker, with right checksums: no command that meets one runs its code."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.command_line import CommandLine, WarmCommandLine
from support.hostile_checkpoint import ATTACKS, pickle_rest, store_object_as_weight
from support.results_folder import Results

import moebench
from moebench import UsageError

Attack = Callable[[Path, Path], None]


@pytest.fixture
def copied(finished: CommandLine, cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    """A copy of finished runs, as one that was downloaded."""
    shutil.copytree(finished.folder, cli.folder, dirs_exist_ok=True)
    monkeypatch.chdir(cli.folder)  # where the data of the runs are
    return cli


def attack_run(cli: CommandLine, attack: Attack) -> tuple[Path, Path]:
    """Rewrite the checkpoint of one run; return the run's folder and the file that the attack would write."""
    folder, marker = Results(cli.folder / "results").folder("switch", 0), cli.folder / "marker"
    (checkpoint,) = (folder / "checkpoints").glob("*.ckpt")
    attack(checkpoint, marker)
    return folder, marker


@pytest.mark.parametrize("attack", ATTACKS)
def test_reading_commands_run_no_code_of_a_checkpoint(
    copied: CommandLine, warm: WarmCommandLine, attack: Attack
) -> None:
    folder, marker = attack_run(copied, attack)
    ended = warm(copied, "curve", "./tiny.yaml", "--vary", "layout.capacity_factor_eval=1", "--results", "results")
    assert ended.code == 2
    assert ended.err.splitlines()[-1].startswith(f"error: results/runs/{folder.name}/checkpoints/")
    assert "refused" in ended.err
    assert "Traceback" not in ended.err
    for command in (("probe", folder.name), ("compare", "./tiny.yaml"), ("list", "runs"), ("plan", "./tiny.yaml")):
        assert warm(copied, *command).code == 0
    with pytest.raises(UsageError, match="refused"):
        moebench.load_model(folder)
    assert not marker.exists()


def test_a_probe_of_kept_weights_runs_no_code(copied: CommandLine, warm: WarmCommandLine) -> None:
    shutil.rmtree(copied.folder / "results" / "runs")
    warm.train(copied, "train.keep_checkpoints=[1]")
    folder = Results(copied.folder / "results").folder("switch", 0)
    (checkpoint,) = (folder / "checkpoints" / "kept").glob("*.ckpt")
    store_object_as_weight(checkpoint, copied.folder / "marker")
    for section in ("history", "ablations"):
        ended = warm(copied, "probe", folder.name, "--show", section)
        assert ended.code == 2
        (line,) = ended.err.splitlines()
        assert line.startswith(f"error: results/runs/{folder.name}/checkpoints/kept/step_")
        assert "refused" in line
    assert not (copied.folder / "marker").exists()


@pytest.mark.parametrize("attack", [store_object_as_weight, pytest.param(pickle_rest, marks=pytest.mark.slow)])
def test_a_run_does_not_resume_from_a_checkpoint_with_code(
    copied: CommandLine, warm: WarmCommandLine, attack: Attack
) -> None:
    folder, marker = attack_run(copied, attack)
    (folder / "result.json").unlink()  # unfinished, so that it is resumed
    ended = warm.train(copied)
    assert ended.code == 1
    assert "failed: switch seed 0" in ended.err
    assert "refused" in ended.err
    assert not marker.exists()


def test_a_run_in_the_foreground_does_not_either(copied: CommandLine, warm: WarmCommandLine) -> None:
    folder, marker = attack_run(copied, store_object_as_weight)
    (folder / "result.json").unlink()
    ended = warm.train(copied, "--foreground", "switch/0")
    assert ended.code == 1
    (line,) = [line for line in ended.err.splitlines() if "refused" in line]
    assert line.startswith("failed: switch · seed 0: results/runs/")
    assert "Traceback" not in ended.err  # of the code that is debugged, not of a file
    assert not marker.exists()


def test_a_folder_cannot_name_a_plugin_to_run(copied: CommandLine) -> None:
    folder, marker = Results(copied.folder / "results").folder("switch", 0), copied.folder / "marker"
    plugin = copied.folder / "evil.py"
    plugin.write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()")
    cell = folder / "cell.json"
    values = json.loads(cell.read_text()) | {"plugins": [str(plugin)], "plugin_digests": []}
    del values["checksum"]  # as in a folder of an earlier version
    cell.write_text(json.dumps(values))
    with pytest.raises(UsageError, match=r"needs the plug-in .*evil\.py"):
        moebench.load_model(folder)
    assert not marker.exists()
    assert moebench.load_model(folder, plugins=[plugin])[0] is not None
    assert marker.exists()
