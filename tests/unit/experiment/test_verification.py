"""`verify` and `rm` on a store that was trained and tracked by MLflow with SQLite."""

import json
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from support.command_line import FIXTURE_TIMEOUT_S, CommandLine, WarmCommandLine
from support.hostile_checkpoint import ATTACKS
from support.results_folder import Results, journal
from support.run_folders import write_cell

from moebench.experiment.machine_check import check_versions
from moebench.experiment.removal import plan_removal
from moebench.experiment.verification import check_store
from moebench.runs.journal import Point
from moebench.tracking.metric_selection import select_names


def train_tracked(warm: WarmCommandLine, database: Path, folder: Path) -> None:
    """Train two arms of one seed with a tracker, from an empty database on."""
    command_line = CommandLine(folder)
    (folder / "results").mkdir()
    shutil.copy(database, folder / "results" / "mlflow.db")
    command_line.write(grid={"router": ["dense", "switch"]}, seeds=[0])
    try:
        ended = warm(command_line, "run", "./tiny.yaml", timeout=FIXTURE_TIMEOUT_S)
    finally:
        command_line.kill_leftovers()
    assert ended.code == 0, ended.err


@pytest.fixture
def store(
    built_once: Callable[[str, Callable[[Path], Any]], Path],
    tmp_path: Path,
    empty_database: Path,
    warm: WarmCommandLine,
) -> CommandLine:
    """A copy of the store, in a folder where the database's absolute paths do not matter."""
    shutil.copytree(built_once("tracked", partial(train_tracked, warm, empty_database)), tmp_path / "copy")
    return CommandLine(tmp_path / "copy")


@pytest.fixture
def switch(store: CommandLine) -> Path:
    return Results(store.folder / "results").folder("switch", 0)


def edit(file: Path, old: bytes, new: bytes) -> None:
    content = file.read_bytes()
    assert old in content
    file.write_bytes(content.replace(old, new, 1))


def digit(file: Path, key: str) -> None:
    """Change the first digit of a number."""
    content = file.read_text()
    place = content.index(f'"{key}":') + len(key) + 4
    place += content[place] == "-"
    file.write_text(content[:place] + str((int(content[place]) + 1) % 10) + content[place + 1 :])


def execute(store: CommandLine, *statements: str) -> None:
    connection = sqlite3.connect(store.folder / "results" / "mlflow.db")
    with connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()


def problems(store: CommandLine) -> list[tuple[str, str]]:
    findings = check_store(store.folder / "results")
    return [(Path(finding.where).name, finding.problem) for finding in findings if not finding.is_note]


def test_a_store_that_was_just_trained_is_clean(store: CommandLine, warm: WarmCommandLine) -> None:
    ended = warm(store, "verify", "--json")
    assert (ended.code, ended.json["findings"]) == (0, []), ended.out + ended.err
    assert ended.json["machine"]["packages"]["torch"]
    assert warm(store, "verify").out == "0 problems, 0 notes in results\n"


@pytest.mark.parametrize(
    ("name", "damage", "expected"),
    [
        ("result.json", lambda file: digit(file, "bits_per_byte"), "checksum"),
        ("cell.json", lambda file: edit(file, b'"num_heads": 2', b'"num_heads": 1'), "checksum"),
        ("journal.jsonl", lambda file: file.write_bytes(file.read_bytes()[:-200]), "changed after the run was done"),
        ("journal.jsonl", Path.unlink, "is missing"),
        ("load.jsonl", lambda file: edit(file, b'"step": 6', b'"step": 7'), "changed after the run was done"),
        ("labels.json", lambda file: edit(file, b'"step": 12', b'"step": 13'), "changed after the run was done"),
    ],
)
def test_a_changed_file_of_a_run_is_a_finding(store: CommandLine, switch: Path, name: str, damage, expected) -> None:
    damage(switch / name)
    assert [problem for where, problem in problems(store) if where == name and expected in problem]


def test_a_checkpoint_of_another_step_or_cell_is_a_finding(store: CommandLine, switch: Path) -> None:
    checkpoints = switch / "checkpoints"
    for suffix in ("ckpt", "json"):
        (checkpoints / f"step_0000012.{suffix}").rename(checkpoints / f"step_0000099.{suffix}")
    ((where, problem),) = problems(store)
    assert where == "step_0000099.ckpt"
    assert "it is the checkpoint of step 12, under another name" in problem
    dense = Results(store.folder / "results").folder("dense", 0)
    shutil.rmtree(checkpoints)
    shutil.copytree(dense / "checkpoints", checkpoints)
    ((_, problem),) = problems(store)
    assert f"it is of the cell {dense.name}" in problem


def test_the_path_is_named_once(store: CommandLine, switch: Path, warm: WarmCommandLine) -> None:
    digit(switch / "result.json", "bits_per_byte")
    (switch / "journal.jsonl").write_text("no point\n")
    (store.folder / "results" / "experiments" / "tiny.json").write_text("{}")
    ended = warm(store, "verify", "--tracker", "none")
    for name in ("result.json", "journal.jsonl", "experiments/tiny.json"):
        (line,) = [line for line in ended.out.splitlines() if line.split(": ")[0].endswith(name)]
        assert line.count(name) == 1, line


@pytest.mark.parametrize("key", ["trivial_baselines", "seed_plans", "margin"])
def test_a_changed_number_in_a_record_is_a_finding(store: CommandLine, key: str) -> None:
    record = store.folder / "results" / "experiments" / "tiny.json"
    text = record.read_text()
    place = text.index(f'"{key}"') + re.search(r"\d", text[text.index(f'"{key}"') :]).start()  # type: ignore[union-attr]
    record.write_text(f"{text[:place]}{(int(text[place]) + 1) % 10}{text[place + 1 :]}")
    ((where, problem),) = problems(store)
    assert where == "tiny.json"
    assert "does not match its checksum" in problem


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_checkpoint_of_an_attacker_is_a_finding(store: CommandLine, switch: Path, attack) -> None:
    (checkpoint,) = (switch / "checkpoints").glob("*.ckpt")
    attack(checkpoint, store.folder / "marker")
    ((where, problem),) = problems(store)
    assert where == checkpoint.name
    assert problem.startswith("refused")
    assert "weights_only" not in problem  # torch recommends to turn it off
    assert not (store.folder / "marker").exists()


def test_kept_weights_of_an_attacker_are_a_finding(store: CommandLine, switch: Path) -> None:
    shutil.copytree(switch / "checkpoints", switch / "kept")
    (switch / "kept").rename(switch / "checkpoints" / "kept")
    assert problems(store) == []
    ATTACKS[0](switch / "checkpoints" / "kept" / "step_0000012.ckpt", store.folder / "marker")
    ((where, problem),) = problems(store)
    assert where == "step_0000012.ckpt"
    assert problem.startswith("refused")


def test_stores_of_earlier_versions_are_clean_and_noted(store: CommandLine, switch: Path) -> None:
    for file in (switch / "result.json", switch / "cell.json"):
        values = json.loads(file.read_text())
        for key in ("checksum", "records", "version", "plugin_digests"):
            values.pop(key, None)
        file.write_text(json.dumps(values))
    manifest = switch / "checkpoints" / "step_0000012.json"
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({key: values[key] for key in ("step", "sha256", "bytes")}))
    findings = list(check_store(store.folder / "results"))
    assert {(Path(finding.where).name, finding.problem) for finding in findings} == {
        (name, "no checksum recorded") for name in ("result.json", "cell.json", "step_0000012.json")
    }
    assert all(finding.is_note for finding in findings)


def test_fix_repairs_the_tracker_and_the_records(store: CommandLine, switch: Path, warm: WarmCommandLine) -> None:
    results = store.folder / "results"
    runs = f"(select run_uuid from tags where value = '{switch.name}')"
    execute(
        store,
        "insert into metrics select key, value, timestamp - 5, run_uuid, step, is_nan from metrics where step = 7",
        "delete from metrics where step = 3 and key = 'loss/task'",
        "update tags set value = '{}' where key = 'mlflow.moebench.cursor'",
        f"update runs set status = 'RUNNING' where run_uuid in {runs}",
    )
    (results / "experiments" / "tiny.json").write_text("{}")
    leftover = switch / "checkpoints" / ".step_0000004.ckpt.tmp"
    leftover.mkdir()
    before = warm(store, "verify", "--json")
    assert before.code == 1
    text = json.dumps(before.json["findings"])
    for expected in ("twice or more", "2 points of the journals are missing", "shown as running", "'name' is missing"):
        assert expected in text
    fixed = warm(store, "verify", "--fix", "--json")
    assert (fixed.code, fixed.json["findings"], fixed.json["failed"]) == (0, [], []), fixed.out
    assert not leftover.exists()
    record = json.loads((results / "experiments" / "tiny.json").read_text())
    assert sorted(cell["arm"] for cell in record["cells"]) == ["dense", "switch"]
    connection = sqlite3.connect(results / "mlflow.db")
    query = "select key, step, round(timestamp / 1000.0, 3) from metrics where step = 7 and run_uuid in"
    rows = connection.execute(f"{query} {runs}").fetchall()
    connection.close()
    (point,) = [point for point in journal(switch) if point["step"] == 7]
    sent = select_names(Point(step=7, time=point["time"], metrics=point["metrics"], end=0))
    assert sorted((key, step) for key, step, _ in rows) == sorted((name, 7) for name in sent)
    assert all(seconds == pytest.approx(point["time"], abs=0.002) for _, _, seconds in rows)


def test_known_faults_of_packages_and_the_clock(store: CommandLine, switch: Path, warm: WarmCommandLine) -> None:
    versions = {"lightning": "2.6.2", "pytorch-lightning": None, "mlflow": "3.9.1"}
    assert [finding.where for finding in check_versions(versions)] == ["lightning", "mlflow"]
    assert not list(check_versions({"lightning": "2.6.5", "mlflow": "3.13.0"}))
    os.utime(switch / "log.txt", (time.time() + 86400,) * 2)
    assert [finding["where"] for finding in warm(store, "verify", "--json").json["findings"]] == ["clock"]


def test_removal_of_a_run(store: CommandLine, switch: Path, warm: WarmCommandLine) -> None:
    refused = warm(store, "rm", switch.name[:5])
    assert (refused.code, switch.exists()) == (2, True)
    assert "add --yes" in refused.err
    with FileLock(switch / ".lock"):
        busy = warm(store, "rm", switch.name, "--yes")
    assert (busy.code, switch.exists()) == (2, True)
    assert "is being trained" in busy.err
    removed = warm(store, "rm", switch.name[:5], "--yes", "--json")
    assert (removed.code, removed.json["runs"], switch.exists()) == (0, [switch.name], False), removed.err
    assert not list((store.folder / "results").glob(".removed-*"))
    connection = sqlite3.connect(store.folder / "results" / "mlflow.db")
    query = (
        "select lifecycle_stage from runs join tags using (run_uuid) where key = 'mlflow.moebench.cell' and value = ?"
    )
    assert connection.execute(query, (switch.name,)).fetchall() == [("deleted",)]
    connection.close()
    unknown = warm(store, "rm", "tinny", "--yes")
    assert unknown.code == 2
    assert "Did you mean 'tiny'" in unknown.err


def test_removal_of_an_experiment_keeps_shared_runs(store: CommandLine, switch: Path, warm: WarmCommandLine) -> None:
    results = store.folder / "results"
    dense = Results(results).folder("dense", 0)
    other = {"name": "other", "cells": [{"id": dense.name, "arm": "dense", "seed": 0}]}
    (results / "experiments" / "other.json").write_text(json.dumps(other))
    removed = warm(store, "rm", "tiny", "--yes", "--json")
    assert removed.code == 0, removed.err
    assert (removed.json["runs"], removed.json["kept"]) == ([switch.name], [dense.name])
    assert not switch.exists()
    assert dense.exists()
    assert not (results / "experiments" / "tiny").exists()
    assert [path.name for path in (results / "experiments").iterdir() if path.name != ".lock"] == ["other.json"]


def test_a_run_that_is_a_link_is_unlinked(tmp_path: Path, warm: WarmCommandLine) -> None:
    elsewhere = tmp_path / "elsewhere" / "aaaa"
    write_cell(elsewhere)
    (tmp_path / "results" / "runs").mkdir(parents=True)
    (tmp_path / "results" / "runs" / "aaaa").symlink_to(elsewhere)
    assert len(plan_removal(tmp_path / "results", "aaaa").runs) == 1
    assert warm(CommandLine(tmp_path), "rm", "aaaa", "--yes").code == 0
    assert (elsewhere / "cell.json").exists()
    assert not (tmp_path / "results" / "runs" / "aaaa").exists()
