"""One finished grid for the tests that only read."""

from collections.abc import Iterator

import pytest
from command_line import CommandLine


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
