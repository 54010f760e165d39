"""The grid that tests interrupt, and the reference that was trained without interruption."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.command_line import CommandLine, WarmCommandLine
from support.interrupted_grid import train_without_interruption, write_grid
from support.results_folder import Results


@pytest.fixture(scope="session")
def reference(built_once: Callable[[str, Callable[[Path], Any]], Path], warm: WarmCommandLine) -> CommandLine:
    """The grid trained and compared without interruption: the result that interrupted grids must have."""
    return CommandLine(built_once("reference", partial(train_without_interruption, warm)))


@pytest.fixture
def results(cli: CommandLine) -> Results:
    write_grid(cli)
    return Results(cli.folder / "results")
