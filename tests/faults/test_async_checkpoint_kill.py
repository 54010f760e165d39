"""A kill while a thread writes a checkpoint: the one before is valid, and the run continues from it."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.training_cases import Run, assert_same_runs, tiny_config, write_text

from moebench.parallel.checkpoint import checkpoint_path, find_newest_valid

KILLED = """
import sys, time
from pathlib import Path
from support.training_cases import Run, tiny_config
from moebench.parallel import async_checkpoint, checkpoint
from moebench.training.callback import CellCallback

publish = checkpoint._publish

def hang(unfinished, folder, *arguments):
    if folder.name == "step_0000006.ckpt":
        print("written", flush=True)
        time.sleep(600)
    publish(unfinished, folder, *arguments)

checkpoint._publish = hang
steps = CellCallback.on_train_batch_end
def follow(self, trainer, *arguments):
    steps(self, trainer, *arguments)
    print("step", trainer.global_step, flush=True)
CellCallback.on_train_batch_end = follow
text, folder = map(Path, sys.argv[1:])
config = tiny_config(text, router="loss_free", train={"checkpoint_every": 3}, parallel={"async_checkpoints": True})
Run(config, folder)()
"""


@pytest.mark.slow
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    arguments = [sys.executable, "-c", KILLED, str(text), str(tmp_path / "killed")]
    folders = [Path(__file__).parents[1], Path(__file__).parents[2]]
    environment = {"PYTHONPATH": ":".join(map(str, folders)), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        lines: list[str] = []
        while "step 8" not in lines or "written" not in lines:  # training continues while the write hangs
            line = process.stdout.readline()
            assert line, lines
            lines.append(line.strip())
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    config = tiny_config(text, router="loss_free", train={"checkpoint_every": 3})
    killed, whole = Run(config, tmp_path / "killed"), Run(config, tmp_path / "whole")
    assert (killed.checkpoints / ".step_0000006.ckpt.tmp").is_dir()
    assert find_newest_valid(killed.checkpoints) == (checkpoint_path(killed.checkpoints, 3), [])
    assert killed() is not None
    assert whole() is not None
    assert_same_runs(whole, killed)
    assert not list(killed.checkpoints.glob(".step*"))
