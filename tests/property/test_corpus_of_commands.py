"""Whole commands with mistakes, and damaged results folders: the line that each of them ends with."""

import base64
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.run_folders import write_cell
from support.tracked_runs import build_experiment

from moebench import __main__ as program

CORPUS = Path(__file__).parents[1] / "corpus"
COMMANDS: list[dict[str, str]] = json.loads((CORPUS / "commands.json").read_text())
STORES: list[dict[str, str]] = json.loads((CORPUS / "stores.json").read_text())
TINY = """
base: {task: {name: language, sequence_length: 32}, model: {d_model: 16, num_layers: 2, num_heads: 2, ffn_width: 128}}
grid: {router: [dense, switch]}
seeds: [0]
"""


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command in this process; return its code, its output and its errors."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "case.yaml").write_text(TINY)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moebench", *arguments])
        code = program._run()
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("case", COMMANDS, ids=lambda case: case["command"][:60])
def test_a_command_of_the_corpus(call: Callable[..., tuple[int, str, str]], case: dict[str, str]) -> None:
    code, out, err = call(*shlex.split(case["command"]))
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert case["expected"] in err


def apply_damage(results: Path, case: dict[str, str]) -> None:
    """Replace a file of a results folder by what the case says."""
    path = results / case["file"]
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    match case.get("kind"):
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "file":
            path.write_text("x")
        case _ if "copy" in case:
            shutil.copy(results / case["copy"], path)
        case _ if "base64" in case:
            path.write_bytes(base64.b64decode(case["base64"]))
        case _:
            path.write_text(case["text"])


@pytest.mark.parametrize("case", STORES, ids=lambda case: case["name"])
def test_a_damaged_store_of_the_corpus(
    call: Callable[..., tuple[int, str, str]], tmp_path: Path, case: dict[str, str]
) -> None:
    results = tmp_path / "results"
    for folder in build_experiment(results):
        write_cell(folder, arm="switch", seed=int(folder.name[-1]))
    apply_damage(results, case)
    code, out, err = call("verify", "--json", "--results", "results")
    assert code == 1, err
    problems = [f"{f['where']}: {f['problem']}" for f in json.loads(out)["findings"] if f["level"] == "problem"]
    named = case["file"].split("/")[-1].removesuffix("/meta.json")
    matching = [line for line in problems if case["expected"] in line]
    assert matching, problems
    assert all(len(line.splitlines()) == 1 for line in problems)
    assert any(part in line for line in matching for part in (named, case["file"].split("/")[0]))
