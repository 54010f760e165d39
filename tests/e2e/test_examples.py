"""The programs in examples/, run as a reader runs them."""

import subprocess
import sys

import pytest
from support.command_line import ROOT, CommandLine, WarmCommandLine

SMALL = ("train.steps=6", "seeds=[0]", "task.eval_windows=4", "task.data.path=text", "task.data.tokenizer=bytes")


def run_example(cli: CommandLine, name: str, *arguments: str) -> str:
    """Run one program in the folder of a command line, beside the experiments, and return what it printed."""
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(command, cwd=cli.folder, env=cli.environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_layer_learns_in_a_plain_training_loop(cli: CommandLine) -> None:
    assert "accuracy 1.00" in run_example(cli, "layer.py", "120")


def test_a_router_of_ones_own_is_compared_and_read_with_pandas(cli: CommandLine, warm: WarmCommandLine) -> None:
    trained = warm.run_script(cli, ROOT / "examples" / "own_router.py", "results", *SMALL)
    assert trained.code == 0, trained.err
    compared = trained.out
    assert "sigmoid_router" in compared
    assert "Quality: bits per byte on the test split" in compared
    table = warm.run_script(cli, ROOT / "examples" / "results.py", "results").out
    assert "test/bits_per_byte" in table
    (line,) = [line for line in table.splitlines() if line.startswith("settings that differ: ")]
    assert "router.name" in line


def test_every_example_is_tested() -> None:
    assert sorted(file.name for file in (ROOT / "examples").glob("*.py")) == ["layer.py", "own_router.py", "results.py"]


@pytest.mark.parametrize("name", ["layer.py", "own_router.py", "results.py"])
def test_every_example_is_linked_from_the_page_on_the_api(name: str) -> None:
    assert f"(../examples/{name})" in (ROOT / "docs" / "api.md").read_text()
