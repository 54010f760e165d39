"""The programs in examples/, run as a reader runs them."""

import pytest
from support.command_line import ROOT, CommandLine, WarmCommandLine

SMALL = ("train.steps=6", "seeds=[0]", "task.eval_windows=4", "task.data.path=text", "task.data.tokenizer=bytes")


def test_the_layer_learns_in_a_plain_training_loop(cli: CommandLine, warm: WarmCommandLine) -> None:
    done = warm.run_script(cli, ROOT / "examples" / "layer.py", "120")
    assert done.code == 0, done.err
    assert "accuracy 1.00" in done.out


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
