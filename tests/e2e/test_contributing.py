"""The code blocks of CONTRIBUTING.md, run as a contributor would run them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = {name: f"# {name}\n{body}" for name, body in re.findall(r"```python\n# (\S+\.py)\n(.*?)```", PAGE, re.DOTALL)}
SMALL = ["train.steps=6", "train.batch_size=4", "seeds=[0]", "task.sequence_length=16"]


def moebench(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MOEBENCH_RESULTS": str(tmp_path / "results")}
    command = [sys.executable, "-m", "moebench", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


def test_the_page_has_a_block_for_each_kind() -> None:
    assert sorted(BLOCKS) == ["my_layout.py", "my_router.py", "my_task.py"]


@pytest.mark.parametrize(
    ("file", "grid", "arms"),
    [
        ("my_router.py", ["grid.router=[my_router]"], ["my_router"]),
        ("my_layout.py", ["base.layout={name: top_only, num_experts: 4}", "grid.router=[switch]"], ["switch"]),
        ("my_task.py", ["base.task={name: repeat}", "grid.router=[dense,hash]"], ["dense", "hash"]),
    ],
)
def test_a_block_runs_as_a_plugin(tmp_path: Path, file: str, grid: list[str], arms: list[str]) -> None:
    (tmp_path / file).write_text(BLOCKS[file], encoding="utf-8")
    plugin = ["--plugin", str(tmp_path / file)]
    command = ["experiments/quickstart.yaml", *plugin, *grid, *SMALL]
    done = moebench(tmp_path, "run", *command, "--tracker", "none", "--json")
    assert done.returncode == 0, done.stderr
    assert [cell["state"] for cell in json.loads(done.stdout)["cells"]] == ["done"] * len(arms)
    compared = moebench(tmp_path, "compare", *command, "--json")
    assert compared.returncode == 0, compared.stderr
    assert list(json.loads(compared.stdout)["arms"]) == arms


def test_the_router_passes_the_contract_tests_on_request(tmp_path: Path) -> None:
    (tmp_path / "my_router.py").write_text(BLOCKS["my_router.py"], encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "tests/contract", "-p", "no:cacheprovider", "-m", "not slow"]
    command += ["--plugin", str(tmp_path / "my_router.py"), "--router", "my_router"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"\d+ passed", done.stdout)
