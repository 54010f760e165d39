"""The installed package, outside the repository: its experiments are found by name and run."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.command_line import ROOT, CommandLine
from support.results_folder import Results


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the package, without its dependencies, into a folder of its own."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    shutil.copytree(ROOT / "moebench", source / "moebench", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
    # The build tool of this environment: there need not be a network.
    command = [*pip, "--no-build-isolation", "--target", str(target), str(source)]
    completed = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert completed.returncode == 0, completed.stderr
    return target


@pytest.mark.slow
def test_a_packaged_experiment_runs_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    cli = CommandLine(tmp_path)
    environment = cli.environment | {"PYTHONPATH": str(installed)}
    small = ("grid.router=[dense,switch]", "seeds=[0]", "train.steps=3", "task.eval_windows=4")
    ended = cli.wait(cli.start("run", "quickstart", *small, "--tracker", "none", env=environment))
    assert ended.code == 0, ended.err
    assert "2 of 2 cells done" in ended.err
    assert Results(tmp_path / "results").statuses() == {("dense", 0): "done", ("switch", 0): "done"}
    listed = cli.wait(cli.start("list", "experiments", "--json", env=environment)).json
    assert {row["name"] for row in listed} == {file.stem for file in (ROOT / "moebench/experiments").glob("*.yaml")}
    assert all(Path(row["file"]).is_relative_to(installed) for row in listed)
