"""One finished grid for the tests that only read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.command_line import CommandLine


@pytest.fixture(scope="session")
def finished(built_once: Callable[[str, Callable[[Path], Any]], Path]) -> CommandLine:
    """The tiny experiment with three seeds, trained once: for reading only."""
    return CommandLine(built_once("finished", train))


def train(folder: Path) -> None:
    command_line = CommandLine(folder)
    command_line.write(seeds=[0, 1, 2])
    try:
        ended = command_line.train("--json")
    finally:
        command_line.kill_leftovers()
    assert ended.code == 0, ended.err
    (folder / "run.json").write_text(ended.out)
    (folder / "run.err").write_text(ended.err)
