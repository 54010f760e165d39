"""A command line in a folder of its own, whose processes are found and ended."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from command_line import CommandLine, WarmCommandLine


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[CommandLine]:
    """A fresh folder with the tiny experiment; nothing that was started outlives the test."""
    command_line = CommandLine(tmp_path)
    command_line.write()
    yield command_line
    command_line.kill_leftovers()


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmCommandLine]:
    """Calls without start-up: for looking at what a fault left, and for going on after it."""
    scratch = tmp_path_factory.mktemp("warm")
    command_line = WarmCommandLine(CommandLine(scratch).environment, scratch)
    yield command_line
    command_line.close()
