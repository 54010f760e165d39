"""The results folder is deleted or moved while cells are trained."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.command_line import CommandLine, WarmCommandLine, wait_for_step
from support.interrupted_grid import RESUME
from support.results_folder import Results

LOSE: dict[str, Callable[[Path], object]] = {
    "deleted": shutil.rmtree,
    "moved": lambda path: path.rename(path.with_name("elsewhere")),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["deleted", "moved"])
def test_a_lost_results_folder_ends_the_run(
    cli: CommandLine, results: Results, warm: WarmCommandLine, how: str
) -> None:
    process = cli.start_training("train.steps=5000")
    wait_for_step(results, step=20)
    LOSE[how](results.path)
    ended = cli.wait(process)
    assert ended.code == 2
    (line,) = [line for line in ended.err.splitlines() if "error" in line.lower()]
    assert line.startswith("error: results folder results: was deleted or moved during the run")
    assert "Traceback" not in ended.err
    cli.assert_no_process_is_left()
    assert not list(results.path.rglob("*.json"))
    if how == "moved":
        again = warm(cli, *RESUME, "--results", "elsewhere", "--json")  # in its new place, other cells of the grid
        assert again.code == 0, again.err
