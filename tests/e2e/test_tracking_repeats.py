"""Whatever fails and is repeated: the tracker has each value once, and what belongs together stays together."""

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.command_line import CommandLine, WarmCommandLine
from support.tracked_runs import build_cell, build_experiment, write_checkpoint, write_final_files, write_steps

from moebench.runs.journal import Journal
from moebench.tracking.address import default_uri
from moebench.tracking.replay import replay
from moebench.tracking.stored_runs import audit_runs, delete_runs

CELL = {"id": "0" * 12, "arm": "a", "seed": 0}


def rows(results: Path, query: str) -> list[Any]:
    with closing(sqlite3.connect(results / "mlflow.db")) as database:
        return database.execute(query).fetchall()


def append(folder: Path, last: int, time_s: float) -> None:
    """Append steps up to the last one, measured at a time that no other attempt has."""
    with Journal(folder / "journal.jsonl") as journal:
        first = 1 + max((json.loads(line)["step"] for line in journal.path.read_text().splitlines()), default=0)
        for step in range(first, last + 1):
            journal.append(step, {"loss/task": 1 / step}, time=time_s + step)
            if step % 4 == 0:
                journal.append(step, {"eval/bits_per_byte": 2 / step}, time=time_s + step)


def fail(folder: Path) -> None:
    write_final_files(folder, "failed", "killed")


def rewind(folder: Path, step: int) -> None:
    (folder / "result.json").unlink(missing_ok=True)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    if step:
        write_checkpoint(folder, step)
    with Journal(folder / "journal.jsonl") as journal:
        journal.truncate_after(step)


def test_steps_repeated_after_a_failed_run_was_sent_are_not_doubled(tmp_path: Path, empty_database: Path) -> None:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    uri, folder = default_uri(tmp_path), build_cell(tmp_path, "quickstart", CELL)
    append(folder, 15, 1e9)
    fail(folder)
    replay(tmp_path, uri)  # all 15 steps: the run has ended
    rewind(folder, 10)
    for last in (10, 12, 14, 18):  # the resumed run, sent at each of its checkpoints
        append(folder, last, 2e9)
        write_checkpoint(folder, last)
        replay(tmp_path, uri, live=True)
    write_final_files(folder)
    replay(tmp_path, uri)
    assert [s for (s,) in rows(tmp_path, "select step from metrics where key='loss/task' order by step")] == [
        *range(1, 19)
    ]
    assert audit_runs(tmp_path, default_uri(tmp_path)) == []


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("train"), st.integers(1, 8)),
        st.tuples(st.just("save"), st.just(0)),
        st.tuples(st.just("send"), st.just(0)),
        st.tuples(st.just("fail and send"), st.just(0)),
        st.tuples(st.just("lose the cursor"), st.just(0)),
        st.tuples(st.just("rewind"), st.integers(0, 12)),
    ),
    max_size=14,
)


@pytest.mark.slow
@settings(max_examples=15)
@given(events=EVENTS)
def test_random_sequences_send_each_value_once(
    tmp_path_factory: pytest.TempPathFactory, empty_database: Path, events: list[tuple[str, int]]
) -> None:
    results = tmp_path_factory.mktemp("sequence")
    shutil.copy(empty_database, results / "mlflow.db")
    uri, folder = default_uri(results), build_cell(results, "quickstart", CELL)
    (folder / "journal.jsonl").touch()
    step = 0
    for number, (event, value) in enumerate(events, 1):
        if event == "train":
            step += value
            (folder / "result.json").unlink(missing_ok=True)
            append(folder, step, 1e9 * number)
        elif event == "save":
            write_checkpoint(folder, step)
        elif event == "lose the cursor":
            with closing(sqlite3.connect(results / "mlflow.db")) as database, database:
                database.execute("delete from tags where key = 'mlflow.moebench.cursor'")
        elif event == "rewind":
            step = min(step, value)
            rewind(folder, step)
        else:
            if event == "fail and send":
                fail(folder)
            replay(results, uri, live=event == "send")
    write_final_files(folder)
    replay(results, uri)
    assert audit_runs(results, uri) == []


def test_moved_folder_keeps_its_artifacts_and_its_cursor(
    tmp_path: Path, empty_database: Path, warm: WarmCommandLine
) -> None:
    old, new = tmp_path / "old", tmp_path / "new ?#%41"
    folders = build_experiment(old)
    shutil.copy(empty_database, old / "mlflow.db")
    replay(old, default_uri(old))
    shutil.copytree(old, new)
    (new / "runs" / folders[0].name / "labels.json").write_text("{}")
    # In another process: MLflow remembers where the artifacts of a run are.
    assert warm(CommandLine(tmp_path), "sync", "--results", str(new), "--json").json["values"] == 0
    assert not list((old / "mlartifacts").rglob("labels.json"))
    assert len(list((new / "mlartifacts").rglob("labels.json"))) == 1
    assert rows(new, "select count(*) from runs where artifact_uri like '%/old/%'") == [(0,)]
    assert {path.name for path in tmp_path.iterdir()} == {"old", "new ?#%41"}


def test_cells_follow_when_their_parent_was_deleted(tmp_path: Path, empty_database: Path) -> None:
    build_experiment(tmp_path)
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    replay(tmp_path, default_uri(tmp_path))
    assert delete_runs(tmp_path, default_uri(tmp_path), ["experiment"]) == 1
    replay(tmp_path, default_uri(tmp_path))
    parent = "select run_uuid from tags where key = 'mlflow.moebench.cell' and value = 'experiment'"
    active = f"select run_uuid from runs where lifecycle_stage = 'active' and run_uuid in ({parent})"
    (current,) = rows(tmp_path, active)
    assert {*rows(tmp_path, "select value from tags where key = 'mlflow.parentRunId'")} == {current}


def test_no_run_ends_before_it_starts(tmp_path: Path, empty_database: Path) -> None:
    build_experiment(tmp_path)  # its points are older than its files, as after a clock was set back
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    replay(tmp_path, default_uri(tmp_path))
    assert rows(tmp_path, "select count(*) from runs where end_time < start_time") == [(0,)]


def test_cell_that_was_trained_again_replaces_its_run(tmp_path: Path, empty_database: Path) -> None:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    uri, folder = default_uri(tmp_path), build_cell(tmp_path, "quickstart", CELL)
    write_steps(folder, 1, 30)
    write_final_files(folder)
    replay(tmp_path, uri)
    result = json.loads((folder / "result.json").read_text())
    result["throughput"]["tokens_per_s"] = 5e4
    result.pop("checksum", None)
    (folder / "result.json").write_text(json.dumps(result))
    replay(tmp_path, uri)
    query = "select value from metrics join runs using (run_uuid) where key = 'resources/tokens_per_s'"
    assert rows(tmp_path, f"{query} and lifecycle_stage = 'active'") == [(5e4,)]
    assert audit_runs(tmp_path, default_uri(tmp_path)) == []


def test_two_folders_with_the_same_cells_share_a_tracker_without_mixing(tmp_path: Path, empty_database: Path) -> None:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    for name in ("one", "two"):
        build_experiment(tmp_path / name)
        assert replay(tmp_path / name, default_uri(tmp_path)).values == 252
    assert rows(tmp_path, "select count(*) from runs") == [(10,)]


def test_domains_are_a_table_and_the_mean_is_a_chart(tmp_path: Path, empty_database: Path) -> None:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    uri, folder = default_uri(tmp_path), build_cell(tmp_path, "quickstart", CELL)
    names = {"eval/bits_per_byte": 2.0} | {f"eval/bits_per_byte/domain{number}": 2.0 for number in range(4000)}
    with Journal(folder / "journal.jsonl") as journal:
        journal.append(30, names)
    write_final_files(folder)
    replay(tmp_path, uri)
    keys = {key for (key,) in rows(tmp_path, "select distinct key from metrics where key like 'eval/%'")}
    assert keys == {"eval/bits_per_byte"}
    (table,) = (tmp_path / "mlartifacts").rglob("metrics.json")
    assert len(json.loads(table.read_text())["data"]) == 4001 + 4  # two test metrics, a cost and a speed of the result
    assert audit_runs(tmp_path, default_uri(tmp_path)) == []
