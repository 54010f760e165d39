"""A cell on another mesh begins from a copy of what the same cell has reached on the old one."""

import hashlib
import json
from pathlib import Path

import pytest
from support.command_line import CommandLine, Results, WarmCommandLine, journal, send
from support.start_methods import EXPERT_2, SIGNALS, TIMEOUT_S, wait_for_first_steps

RUN = ("run", "./tiny.yaml", "--tracker", "none", "--jobs", "1")


def contents(folder: Path) -> dict[str, str]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != ".lock"]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def stopped_at_some_step(cli: CommandLine, *changes: str) -> Path:
    """Train one cell for a while and stop it."""
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
def test_a_cell_goes_on_on_another_mesh(
    cli: CommandLine, warm: WarmCommandLine, before: tuple[str, ...], after: tuple[str, ...]
) -> None:
    twin = stopped_at_some_step(cli, *before)
    reached, was = journal(twin)[-1]["step"], contents(twin)
    begun = {point["step"]: point["time"] for point in journal(twin)}
    ended = warm(cli, *RUN, *after, "--reshard", "--json", timeout=TIMEOUT_S)
    assert ended.code == 0, ended.err
    assert f"is copied; it goes on from step {reached}" in ended.err
    assert contents(twin) == was
    (own,) = [folder for folder in Results(cli.folder / "results").folders() if folder != twin]
    steps = [point["step"] for point in journal(own) if "loss/task" in point["metrics"]]
    assert steps == [*range(1, 151)]
    kept = [point["step"] for point in journal(own) if begun.get(point["step"]) == point["time"]]
    assert max(kept) == reached
    assert json.loads((own / "result.json").read_text())["status"] == "done"
    assert not list(own.glob(".*.tmp"))


@pytest.mark.slow
def test_without_the_option_and_without_a_twin_it_begins_anew(cli: CommandLine, warm: WarmCommandLine) -> None:
    stopped_at_some_step(cli)
    ended = warm(cli, *RUN, "--reshard", "train.learning_rate=0.001", "parallel.data=2", timeout=TIMEOUT_S)
    assert ended.code == 0, ended.err
    assert "is copied" not in ended.err
    ended = warm(cli, *RUN, "parallel.data=2", timeout=TIMEOUT_S)
    assert ended.code == 0, ended.err
    assert "is copied" not in ended.err
