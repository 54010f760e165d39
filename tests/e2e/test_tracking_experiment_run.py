"""The run of an experiment in MLflow: verdicts, tables, means, report and views, each sent when it has changed."""

import json
import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from support.tracked_runs import build_experiment

from moebench.analysis.compare.summary import refresh_summaries
from moebench.runs.experiment_summary import read_summary, summary_path
from moebench.tracking.address import default_uri
from moebench.tracking.bookkeeping import ATTACHED, CELL, DESCRIBED, NOTE, SENT, VIEWS_DIGEST
from moebench.tracking.experiment_run import TABLE
from moebench.tracking.mlflow_store import MlflowStore
from moebench.tracking.replay import replay
from moebench.tracking.stored_runs import audit_runs
from moebench.tracking.ui import list_links


@pytest.fixture
def results(tmp_path: Path, empty_database: Path) -> Path:
    """Finished runs of a task of this version, and an empty tracker."""
    build_experiment(tmp_path)
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    for path in tmp_path.glob("runs/*/result.json"):
        result = {key: value for key, value in json.loads(path.read_text()).items() if key != "checksum"}
        arm, seed = json.loads((path.parent / "cell.json").read_text())["arm"], int(path.parent.name, 16)
        result |= {"arm": arm, "seed": (seed - 1) % 2, "config": {"task": {"name": "language"}}}
        result["metrics"] = {"bits_per_byte": 2.0 + 0.01 * seed}
        path.write_text(json.dumps(result))
    return tmp_path


def stored(results: Path) -> dict[str, Any]:
    return {run.tags[CELL]: run for run in MlflowStore(default_uri(results), "quickstart").runs()}


def rows(results: Path, query: str) -> list[Any]:
    with closing(sqlite3.connect(results / "mlflow.db")) as database:
        return database.execute(query).fetchall()


def test_parent_has_verdicts_tables_means_and_views(results: Path) -> None:
    refresh_summaries(results)
    replay(results, default_uri(results))
    parent = stored(results)["experiment"]
    note = parent.tags[NOTE]
    assert note.startswith("**Does switch beat dense?**\n\n- switch")
    assert "| arm | seeds | mean |" in note
    assert "`router.name`" in note
    assert parent.last_values["mean/dense"] == pytest.approx(2.035)
    assert parent.last_values["difference/switch"] == pytest.approx(-0.02)
    assert {"path": TABLE, "type": "table"} in json.loads(parent.tags["mlflow.loggedArtifacts"])
    (table,) = (results / "mlartifacts").rglob(TABLE)
    assert json.loads(table.read_text())["columns"][:3] == ["arm", "seeds", "mean"]
    tags = dict(rows(results, "select key, value from experiment_tags"))
    assert tags[NOTE] == "Does switch beat dense?"
    assert {"mlflow.sharedViewState.moebench-router", "mlflow.sharedViewState.moebench-arm"} <= set(tags)
    (link,) = list_links(results, None, "http://127.0.0.1:5000").values()
    assert "viewStateShareKey=moebench-router" in link


def test_nothing_is_sent_twice_and_changes_are_sent(results: Path) -> None:
    refresh_summaries(results)
    for _ in range(2):
        replay(results, default_uri(results))
    count = "select count(*) from metrics where key like 'mean/%'"
    assert rows(results, count) == [(2,)]
    report = results / "experiments" / "quickstart" / "report.html"
    report.write_text("<h1>Report</h1>")
    assert replay(results, default_uri(results)).values == 0
    (artifact,) = (results / "mlartifacts").rglob("report.html")
    assert artifact.read_text() == "<h1>Report</h1>"
    outside = results / "secret"
    outside.write_text("secret")
    report.unlink()
    report.symlink_to(outside)
    replay(results, default_uri(results))
    assert artifact.read_text() == "<h1>Report</h1>"


def test_crash_before_the_marks_are_written_repeats_nothing(results: Path) -> None:
    refresh_summaries(results)
    replay(results, default_uri(results))
    before = rows(results, "select count(*) from metrics")
    marks = ", ".join(f"'{tag}'" for tag in (SENT, DESCRIBED, ATTACHED, VIEWS_DIGEST))
    with closing(sqlite3.connect(results / "mlflow.db")) as database, database:
        database.execute(f"delete from tags where key in ({marks})")
    replay(results, default_uri(results))
    assert rows(results, "select count(*) from metrics") == before
    assert audit_runs(results, default_uri(results)) == []


def test_a_damaged_summary_is_reported_and_the_rest_is_sent(results: Path) -> None:
    summary_path(results, "quickstart").write_text("{}")
    report = replay(results, default_uri(results))
    assert len(report.problems) == 1
    assert "summary.json: damaged" in report.problems[0]
    assert stored(results)["experiment"].tags["progress"] == "4 of 4 done"


def test_summaries_follow_the_results(results: Path) -> None:
    refresh_summaries(results)
    path = summary_path(results, "quickstart")
    first = path.stat().st_mtime_ns
    refresh_summaries(results)
    assert path.stat().st_mtime_ns == first
    os.utime(path, (4e9, 4e9))  # the clock was set back since
    (run, *_) = sorted((results / "runs").iterdir())
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(result | {"metrics": {"bits_per_byte": 1.0}}))
    refresh_summaries(results)
    summary = read_summary(results, "quickstart")
    assert summary is not None
    assert summary.arms["switch"].mean == pytest.approx(1.51)


def test_runs_of_an_earlier_version_are_recognised_and_completed(results: Path) -> None:
    uri = default_uri(results)
    replay(results, uri)
    with closing(sqlite3.connect(results / "mlflow.db")) as database, database:
        database.execute("update tags set key = replace(key, 'mlflow.moebench.', 'moebench.')")
        database.execute("update tags set value = 'yes' where key = 'moebench.described'")
        database.execute("delete from params where key not in ('router.name', 'seed')")
        for table in ("metrics", "latest_metrics"):  # names and steps of then
            database.execute(f"update {table} set key = 'final/' || substr(key, 11), step = 30 where key like 'reso%'")
            database.execute(f"update {table} set key = 'final/' || substr(key, 6), step = 30 where key like 'test/%'")
    assert audit_runs(results, uri) == []
    before = rows(results, "select count(*) from metrics")
    assert replay(results, uri).values == 0
    assert rows(results, "select count(*) from metrics") == before
    assert rows(results, "select count(*) from runs where lifecycle_stage = 'active'") == [(5,)]
    assert rows(results, "select count(*) from params where key = 'training.steps'") == [(4,)]
    assert audit_runs(results, uri) == []
