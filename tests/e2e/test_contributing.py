"""The code blocks of CONTRIBUTING.md, run as a contributor would run them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.command_line import ROOT, CommandLine, WarmCommandLine

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = {name: f"# {name}\n{body}" for name, body in re.findall(r"```python\n# (\S+\.py)\n(.*?)```", PAGE, re.DOTALL)}
SMALL = ["train.steps=6", "train.batch_size=4", "seeds=[0]", "task.sequence_length=16"]
TEXT = ["task.data.path=text", "task.data.tokenizer=bytes"]


def test_the_page_has_a_block_for_each_kind() -> None:
    assert sorted(BLOCKS) == ["my_layout.py", "my_loss.py", "my_router.py", "my_task.py"]


@pytest.mark.parametrize(
    ("file", "grid", "arms"),
    [
        ("my_router.py", [*TEXT, "grid.router=[my_router]"], ["my_router"]),
        ("my_layout.py", [*TEXT, "base.layout={name: top_only, num_experts: 4}", "grid.router=[switch]"], ["switch"]),
        ("my_loss.py", [*TEXT, "grid.router=[{name: top_k, losses: {logit_square: 0.1}}]"], ["top_k"]),
        ("my_task.py", ["base.task={name: repeat}", "grid.router=[dense,hash]"], ["dense", "hash"]),
    ],
)
def test_a_block_runs_as_a_plugin(
    cli: CommandLine, warm: WarmCommandLine, file: str, grid: list[str], arms: list[str]
) -> None:
    (cli.folder / file).write_text(BLOCKS[file], encoding="utf-8")
    command = ["experiments/quickstart.yaml", "--plugin", file, *grid, *SMALL]
    done = warm(cli, "run", *command, "--tracker", "none", "--json")
    assert done.code == 0, done.err
    assert [cell["state"] for cell in done.json["cells"]] == ["done"] * len(arms)
    compared = warm(cli, "compare", *command, "--json")
    assert compared.code == 0, compared.err
    assert list(compared.json["arms"]) == arms


@pytest.mark.slow
def test_the_router_passes_the_contract_tests_on_request(tmp_path: Path) -> None:
    (tmp_path / "my_router.py").write_text(BLOCKS["my_router.py"], encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "tests/contract", "-p", "no:cacheprovider", "-m", "not slow"]
    command += ["--plugin", str(tmp_path / "my_router.py"), "--router", "my_router"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"\d+ passed", done.stdout)
