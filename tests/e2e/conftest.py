"""A command line in a folder of its own, and one finished grid for the tests that only read."""

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
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    """The tiny experiment with three seeds, trained once: for reading only."""
    command_line = CommandLine(tmp_path_factory.mktemp("finished"))
    command_line.write(seeds=[0, 1, 2])
    ended = command_line.train("--json")
    assert ended.code == 0, ended.err
    (command_line.folder / "run.json").write_text(ended.out)
    (command_line.folder / "run.err").write_text(ended.err)
    yield command_line
    command_line.kill_leftovers()


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmCommandLine]:
    """Calls that need no start-up: for the many that only look or are refused."""
    scratch = tmp_path_factory.mktemp("warm")
    command_line = WarmCommandLine(CommandLine(scratch).environment, scratch)
    yield command_line
    command_line.close()
