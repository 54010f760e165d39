"""Every command that reads a results folder ends with one line, not a traceback, when the folder is damaged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.command_line import CommandLine, WarmCommandLine
from support.refused_commands import assert_refused, contents
from support.results_folder import Results

import moebench

Damage = Callable[[Path, Path], object]
"""Damages a results folder; the second argument is the folder of one of its runs."""


def change(name: str, **changes: Any) -> Damage:
    def damage(results: Path, run: Path) -> None:
        values = json.loads((run / name).read_text())
        del values["checksum"]
        (run / name).write_text(json.dumps(values | changes))

    return damage


def replace_by_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("x")


def replace_by_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


DAMAGES: dict[str, Damage] = {
    "metrics null": change("result.json", metrics=None),
    "metric text": change("result.json", metrics={"bits_per_byte": "x"}),
    "cost list": change("result.json", cost=[1]),
    "status number": change("result.json", status=3),
    "result folder": lambda results, run: replace_by_folder(run / "result.json"),
    "cell empty": lambda results, run: (run / "cell.json").write_text("{}"),
    "cell folder": lambda results, run: replace_by_folder(run / "cell.json"),
    "cell null": change("cell.json", config=None),
    "record empty": lambda results, run: (results / "experiments" / "other.json").write_text("{}"),
    "record folder": lambda results, run: replace_by_folder(results / "experiments" / "tiny.json"),
    "labels": lambda results, run: (run / "labels.json").write_text('{"kinds": {"a": {"values": [], "layers": {}}}}'),
    "log folder": lambda results, run: replace_by_folder(run / "log.txt"),
    "stray checkpoint": lambda results, run: (run / "checkpoints" / "step_abc.json").write_text("{}"),
    "checkpoints file": lambda results, run: replace_by_file(run / "checkpoints"),
    "cache file": lambda results, run: replace_by_file(results / "cache"),
    "runs file": lambda results, run: replace_by_file(results / "runs"),
    "run file": lambda results, run: replace_by_file(run),
    "experiments file": lambda results, run: replace_by_file(results / "experiments"),
    "database folder": lambda results, run: replace_by_folder(results / "mlflow.db"),
    "ui log folder": lambda results, run: ((results / "mlflow.db").touch(), replace_by_folder(results / "ui.log")),
}


FEW = ("result folder", "record folder")
"""One of a run and one of an experiment; the others are slow."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in DAMAGES]
)
def test_no_command_ends_in_a_traceback(
    finished: CommandLine, warm: WarmCommandLine, tmp_path: Path, name: str
) -> None:
    results = tmp_path / "results"
    shutil.copytree(finished.folder / "results", results)
    run = Results(results).folder("switch", 1)
    DAMAGES[name](results, run)
    commands = ["compare ./tiny.yaml", "plan ./tiny.yaml", "list runs", f"probe {run.name}", "verify", f"rm {run.name}"]
    commands += ["curve ./tiny.yaml --vary layout.capacity_factor_eval=1"]
    commands += ["ui --port 5991"] if name in ("database folder", "ui log folder") else []
    for command in commands:
        ended = warm(finished, *command.split(), "--results", str(results))
        assert "Traceback" not in ended.err, f"{command}: {ended.err}"
        assert ended.code in (0, 1, 2, 3)
        if ended.code == 2:
            assert ended.err.count("error: ") == 1
    is_harmless = name in ("stray checkpoint", "log folder", "ui log folder")
    assert warm(finished, "verify", "--results", str(results)).code == (0 if is_harmless else 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["metrics null", "metric text", "cell empty", "record empty", "log folder", "run file"]
)
def test_one_damaged_run_does_not_keep_the_others_from_the_tracker(
    finished: CommandLine, warm: WarmCommandLine, tmp_path: Path, name: str
) -> None:
    results = tmp_path / "results"
    shutil.copytree(finished.folder / "results", results)
    DAMAGES[name](results, Results(results).folder("switch", 1))
    ended = warm(finished, "sync", "--json", "--results", str(results))
    assert "Traceback" not in ended.err
    assert ended.json["runs"] >= 8
    is_reported = name not in ("log folder", "run file")
    assert (ended.code, len(ended.json["problems"])) == ((3, 1) if is_reported else (0, 0)), ended.out


def test_a_damaged_run_is_a_row_of_the_table(finished: CommandLine, tmp_path: Path) -> None:
    shutil.copytree(finished.folder / "results", tmp_path / "results")
    run = Results(tmp_path / "results").folder("switch", 1)
    change("result.json", metrics=None)(tmp_path / "results", run)
    table = moebench.load_runs(tmp_path / "results").set_index("id")
    assert len(table) == 9
    assert table.loc[run.name, "status"] == "damaged"
    assert "'metrics' is 'None'" in table.loc[run.name, "error"]
    assert (table.drop(run.name)["status"] == "done").all()


@pytest.mark.parametrize(
    ("command", "damage"),
    [("run ./tiny.yaml --tracker none", damage) for damage in ("{", "[]", "{}", "\x00\x01", "")]
    + [("compare ./tiny.yaml", "{"), ("plan ./tiny.yaml", "{")],
)
def test_a_damaged_result(
    finished: CommandLine, warm: WarmCommandLine, tmp_path: Path, command: str, damage: str
) -> None:
    shutil.copytree(finished.folder / "results", tmp_path / "results")
    results = Results(tmp_path / "results")
    (results.folder("switch", 1) / "result.json").write_text(damage)
    before = contents(results.path)
    ended = warm(finished, *command.split(), "--results", str(results.path))
    if command.startswith("run"):  # it fails that cell alone
        assert (ended.code, ended.err.count("failed: ")) == (1, 1), ended.err
        assert all(part in ended.err for part in ("result.json", "damaged", "delete it"))
    else:
        assert_refused(ended, ["result.json", "damaged", "delete it"])
    assert {path: data for path, data in contents(results.path).items() if path in before} == before


def test_a_damaged_cell_file(finished: CommandLine, warm: WarmCommandLine, tmp_path: Path) -> None:
    shutil.copytree(finished.folder / "results", tmp_path / "results")
    folder = Results(tmp_path / "results").folder("switch", 1)
    (folder / "cell.json").write_text("{")
    assert_refused(warm(finished, "probe", folder.name, "--results", str(tmp_path / "results")), ["cell.json"])
    listed = warm(finished, "list", "runs", "--json", "--results", str(tmp_path / "results"))
    assert (listed.code, len(listed.json)) == (0, 9)  # the others are listed as before
    (damaged,) = [row for row in listed.json if row["state"] != "done"]
    assert (damaged["id"], damaged["state"]) == (folder.name, "damaged")
    assert "cell.json" in damaged["error"]
