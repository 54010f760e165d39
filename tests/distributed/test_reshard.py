"""With --reshard a cell starts from a copy of the checkpoints of the same cell on another mesh."""

import hashlib
import json
from pathlib import Path

import pytest
from support.command_line import CommandLine, WarmCommandLine, send
from support.results_folder import Results, journal
from support.start_methods import EXPERT_2, SIGNALS, TIMEOUT_S, wait_for_first_steps

RUN = ("run", "./tiny.yaml", "--tracker", "none", "--jobs", "1")


def contents(folder: Path) -> dict[str, str]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != ".lock"]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def train_and_stop(cli: CommandLine, *changes: str) -> Path:
    """Train a cell for some steps and stop it; return its run folder."""
    train = {"steps": 150, "checkpoint_every": 50, "eval_every": 50}
    cli.write(grid={"router": ["switch"]}, seeds=[0], baseline="switch", train=train)
    process = cli.start_training(*changes)
    folder = wait_for_first_steps(cli, step=5)
    number = next(iter(SIGNALS))
    send(process, number)
    assert cli.wait(process).code == SIGNALS[number]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [((), EXPERT_2), (EXPERT_2, ("parallel.data=2",)), (EXPERT_2, ())])
def test_cell_continues_on_another_mesh(
    cli: CommandLine, warm: WarmCommandLine, before: tuple[str, ...], after: tuple[str, ...]
) -> None:
    twin = train_and_stop(cli, *before)
    last_step, before_reshard = journal(twin)[-1]["step"], contents(twin)
    times = {point["step"]: point["time"] for point in journal(twin)}
    ended = warm(cli, *RUN, *after, "--reshard", "--json", timeout=TIMEOUT_S)
    assert ended.code == 0, ended.err
    assert f"is copied; it continues from step {last_step}" in ended.err
    assert contents(twin) == before_reshard
    (copy,) = [folder for folder in Results(cli.folder / "results").folders() if folder != twin]
    steps = [point["step"] for point in journal(copy) if "loss/task" in point["metrics"]]
    assert steps == [*range(1, 151)]
    kept = [point["step"] for point in journal(copy) if times.get(point["step"]) == point["time"]]
    assert max(kept) == last_step
    assert json.loads((copy / "result.json").read_text())["status"] == "done"
    assert not list(copy.glob(".*.tmp"))


@pytest.mark.slow
def test_cell_starts_anew_without_the_option_or_a_twin(cli: CommandLine, warm: WarmCommandLine) -> None:
    train_and_stop(cli)
    ended = warm(cli, *RUN, "--reshard", "train.learning_rate=0.001", "parallel.data=2", timeout=TIMEOUT_S)
    assert ended.code == 0, ended.err
    assert "is copied" not in ended.err
    ended = warm(cli, *RUN, "parallel.data=2", timeout=TIMEOUT_S)
    assert ended.code == 0, ended.err
    assert "is copied" not in ended.err
