"""Run folders arrive in a real MLflow database, completely and once."""

import json
import math
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from support.command_line import BUSY_TIMEOUT_S
from support.tracked_runs import (
    DIGEST,
    STEPS,
    build_cell,
    build_experiment,
    draw_figure,
    write_checkpoint,
    write_final_files,
    write_steps,
)

from moebench.errors import UsageError
from moebench.runs.journal import Journal
from moebench.tracking.address import default_uri
from moebench.tracking.bookkeeping import CELL as CELL_TAG
from moebench.tracking.bookkeeping import CURSOR, DESCRIBED, NON_FINITE, SENT
from moebench.tracking.quiet import silence_mlflow
from moebench.tracking.replay import replay
from moebench.tracking.tracker import Tracker

CELL = {"id": "0" * 12, "arm": "a", "seed": 0}
TABLES = "mlflow.loggedArtifacts"


@pytest.fixture(autouse=True)
def database(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if "new_database" not in request.node.name:
        shutil.copy(request.getfixturevalue("empty_database"), tmp_path / "mlflow.db")


def client(results: Path) -> Any:
    with silence_mlflow():
        from mlflow import MlflowClient

        return MlflowClient(default_uri(results))


def stored_runs(results: Path, experiment: str = "quickstart") -> dict[str, Any]:
    """Return the runs of an experiment in the tracker, by cell."""
    mlflow = client(results)
    runs = mlflow.search_runs([mlflow.get_experiment_by_name(experiment).experiment_id])
    return {run.data.tags[CELL_TAG]: run for run in runs}


def count_duplicates(results: Path) -> int:
    """Count the values that the tracker has more than once."""
    query = "select 1 from metrics group by run_uuid, key, step having count(*) > 1"
    with closing(sqlite3.connect(results / "mlflow.db")) as database:
        return len(database.execute(query).fetchall())


def stored_steps(results: Path, cell: str, key: str = "loss/task") -> list[int]:
    run = stored_runs(results)[cell]
    return [point.step for point in client(results).get_metric_history(run.info.run_id, key)]


def test_everything_of_an_experiment_is_sent(tmp_path: Path) -> None:
    folders = build_experiment(tmp_path)
    report = replay(tmp_path, default_uri(tmp_path))
    # 30 steps of 2 metrics and 3 evaluations in the journal; then 1 finite test metric, 1 cost and 1 speed.
    assert (report.experiments, report.runs, report.values, report.problems) == (1, 4, 4 * 63, ())
    runs = stored_runs(tmp_path)
    parent = runs.pop("experiment")
    assert parent.info.run_name == "quickstart"
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["mlflow.note.content"].startswith("**Does switch beat dense?**")
    assert parent.data.tags["progress"] == "4 of 4 done"
    run = runs[folders[0].name]
    assert len(runs) == 4
    assert all(r.data.tags["mlflow.parentRunId"] == parent.info.run_id for r in runs.values())
    assert run.info.run_name == "switch seed 0"
    assert run.info.status == "FINISHED"
    assert run.data.params == {"router.name": "switch", "seed": "0", "training.steps": "30"}
    tags = run.data.tags
    visible = {key: value for key, value in tags.items() if not key.startswith("mlflow.")}
    assert visible.pop("host")
    assert visible == {"arm": "switch", "seed": "0", "experiment": "quickstart"}
    assert tags["mlflow.moebench.data_digest"] == DIGEST
    assert (tags["mlflow.source.git.commit"], tags["mlflow.moebench.git_dirty"]) == ("abc123", "False")
    assert tags["mlflow.note.content"].startswith("**switch**, seed 0, of the experiment `quickstart`")
    assert "Done after 30 steps" in tags["mlflow.note.content"]
    assert run.data.metrics["test/bits_per_byte"] == 2.03
    assert run.data.metrics["resources/active_params"] == 1e6
    assert "test/load/dead_experts" not in run.data.metrics  # not a number
    assert {(d.dataset.name, d.dataset.digest, d.tags[0].value) for d in run.inputs.dataset_inputs} == {
        ("shakespeare", DIGEST[:36], "training"),
        ("shakespeare", "e", "test"),
    }
    history = client(tmp_path).get_metric_history(run.info.run_id, "loss/task")
    assert [(p.step, p.value, p.timestamp) for p in history] == [
        (step, 3 / step + 1, 1000 * (10**9 + step)) for step in range(1, STEPS + 1)
    ]


def test_artifacts_load_table_and_figures_are_sent(tmp_path: Path) -> None:
    folders = build_experiment(tmp_path)
    (folders[0] / "labels.json").write_text('{"kinds": {}}')
    replay(tmp_path, default_uri(tmp_path))
    mlflow, runs = client(tmp_path), stored_runs(tmp_path)
    run_id = runs[folders[0].name].info.run_id
    names = {file.path for file in mlflow.list_artifacts(run_id)}
    files = {"environment.json", "result.json", "labels.json", "log.txt", "load.png"}
    assert names == files | {"config.yaml", "load.json", "metrics.json"}
    table = json.loads(Path(mlflow.download_artifacts(run_id, "load.json", str(tmp_path))).read_text())
    assert {"path": "load.json", "type": "table"} in json.loads(runs[folders[0].name].data.tags[TABLES])
    assert table["data"][0] == [10, "encoder.1", 19, 2.1053, [10, 2, 3, 4]]
    assert table["data"][1][1] == "decoder.0"
    assert len(table["data"]) == 6
    figure = Path(mlflow.download_artifacts(run_id, "load.png", str(tmp_path)))
    assert figure.read_bytes() == (folders[0] / "load.png").read_bytes()
    assert [file.path for file in mlflow.list_artifacts(runs["experiment"].info.run_id)] == ["curves.png"]
    assert "name: switch" in Path(mlflow.download_artifacts(run_id, "config.yaml", str(tmp_path))).read_text()


def test_second_replay_sends_nothing_even_without_its_local_cursor(tmp_path: Path) -> None:
    folders = build_experiment(tmp_path)
    replay(tmp_path, default_uri(tmp_path))
    assert replay(tmp_path, default_uri(tmp_path)).values == 0
    for folder in folders:
        (entry,) = json.loads((folder / "tracking.json").read_text()).values()
        assert entry["quickstart"]["last_step"] == STEPS
        assert entry["quickstart"]["finished"]
        (folder / "tracking.json").unlink()
    assert replay(tmp_path, default_uri(tmp_path)).values == 0
    assert len(stored_runs(tmp_path)) == 5
    assert count_duplicates(tmp_path) == 0


def test_crash_between_a_batch_and_its_cursor_duplicates_nothing(tmp_path: Path) -> None:
    folders = build_experiment(tmp_path)
    replay(tmp_path, default_uri(tmp_path))
    for run in stored_runs(tmp_path).values():
        for tag in (CURSOR, SENT, DESCRIBED):
            if tag in run.data.tags:
                client(tmp_path).delete_tag(run.info.run_id, tag)
    replay(tmp_path, default_uri(tmp_path))
    assert count_duplicates(tmp_path) == 0
    assert stored_steps(tmp_path, folders[0].name) == [*range(1, STEPS + 1)]
    assert len(stored_runs(tmp_path)[folders[0].name].inputs.dataset_inputs) == 2


def test_empty_tracker_is_filled_again(tmp_path: Path, empty_database: Path) -> None:
    build_experiment(tmp_path)
    first = replay(tmp_path, default_uri(tmp_path))
    shutil.copy(empty_database, tmp_path / "other.db")
    assert replay(tmp_path, f"sqlite:///{tmp_path / 'other.db'}").values == first.values


def test_resumed_run_has_one_value_for_each_step(tmp_path: Path) -> None:
    uri, folder = default_uri(tmp_path), build_cell(tmp_path, "quickstart", CELL)
    write_steps(folder, 1, 15)
    assert replay(tmp_path, uri, live=True).values == 0  # no checkpoint: all steps may be repeated
    write_checkpoint(folder, 10)
    assert replay(tmp_path, uri, live=True).values == 21
    assert stored_runs(tmp_path)[folder.name].info.status == "RUNNING"
    replay(tmp_path, uri)  # the worker was killed
    assert stored_runs(tmp_path)[folder.name].info.status == "KILLED"
    time.sleep(0.01)
    with Journal(folder / "journal.jsonl") as journal:
        journal.truncate_after(10)
    replay(tmp_path, uri, live=True)
    assert stored_runs(tmp_path)[folder.name].info.status == "RUNNING"
    write_steps(folder, 11, STEPS)
    write_final_files(folder)
    replay(tmp_path, uri)
    assert stored_runs(tmp_path)[folder.name].info.status == "FINISHED"
    assert stored_steps(tmp_path, folder.name) == [*range(1, STEPS + 1)]
    assert count_duplicates(tmp_path) == 0


def test_run_resumed_before_the_cursor_sends_no_step_twice(tmp_path: Path) -> None:
    # The newest checkpoint was damaged, so the run resumed from an earlier step than the last one sent.
    uri, folder = default_uri(tmp_path), build_cell(tmp_path, "quickstart", CELL)
    write_steps(folder, 1, 20)
    write_checkpoint(folder, 20)
    replay(tmp_path, uri, live=True)
    with Journal(folder / "journal.jsonl") as journal:
        journal.truncate_after(10)
        for step in range(11, STEPS + 1):
            journal.append(step, {"loss/task": 3 / step + 1}, time=2e9 + step)
    write_final_files(folder)
    replay(tmp_path, uri)
    assert stored_steps(tmp_path, folder.name) == [*range(1, STEPS + 1)]
    assert count_duplicates(tmp_path) == 0


def test_failed_run_has_its_reason_and_a_retry_replaces_the_status(tmp_path: Path) -> None:
    uri, folder = default_uri(tmp_path), build_cell(tmp_path, "quickstart", CELL)
    write_steps(folder, 1, 12)
    with Journal(folder / "journal.jsonl") as journal:
        journal.append(13, {"loss/task": math.nan, "train/grad_norm": math.inf})
    write_final_files(folder, "failed", "loss is not finite at step 13")
    report = replay(tmp_path, uri)
    assert report.non_finite == 2
    run = stored_runs(tmp_path)[folder.name]
    assert run.info.status == "FAILED"
    assert run.data.tags["error"] == "loss is not finite at step 13"
    assert run.data.tags[NON_FINITE] == "first: loss/task at step 13"
    assert max(run.data.metrics.values()) < 1e9
    (folder / "result.json").unlink()
    with Journal(folder / "journal.jsonl") as journal:
        journal.truncate_after(0)
    write_steps(folder, 1, STEPS)
    write_final_files(folder)
    replay(tmp_path, uri)
    run = stored_runs(tmp_path)[folder.name]
    assert (run.info.status, run.data.tags["error"]) == ("FINISHED", "")
    assert stored_steps(tmp_path, folder.name) == [*range(1, STEPS + 1)]


def test_damaged_journal_does_not_affect_other_runs(tmp_path: Path) -> None:
    folders = build_experiment(tmp_path)
    (folders[1] / "journal.jsonl").write_text("broken\n")
    report = replay(tmp_path, default_uri(tmp_path))
    (problem,) = report.problems
    assert f"{folders[1].name}/journal.jsonl, line 1" in problem
    assert stored_steps(tmp_path, folders[3].name) == [*range(1, STEPS + 1)]


def test_later_figures_are_sent_by_the_next_replay(tmp_path: Path) -> None:
    folders = build_experiment(tmp_path)
    replay(tmp_path, default_uri(tmp_path))
    draw_figure(folders[0] / "probe.png")
    draw_figure(tmp_path / "experiments" / "quickstart" / "pareto.png")
    replay(tmp_path, default_uri(tmp_path))
    mlflow, runs = client(tmp_path), stored_runs(tmp_path)
    assert "probe.png" in {f.path for f in mlflow.list_artifacts(runs[folders[0].name].info.run_id)}
    assert "pareto.png" in {f.path for f in mlflow.list_artifacts(runs["experiment"].info.run_id)}
    assert count_duplicates(tmp_path) == 0


def test_cell_of_two_experiments_is_in_both(tmp_path: Path) -> None:
    build_experiment(tmp_path)
    record = json.loads((tmp_path / "experiments" / "quickstart.json").read_text())
    record.pop("checksum", None)
    (tmp_path / "experiments" / "wide.json").write_text(json.dumps({**record, "name": "wide"}))
    replay(tmp_path, default_uri(tmp_path))
    assert len(stored_runs(tmp_path, "wide")) == len(stored_runs(tmp_path, "quickstart")) == 5


def test_unknown_experiment_is_refused(tmp_path: Path) -> None:
    build_experiment(tmp_path)
    with pytest.raises(UsageError, match="Did you mean 'quickstart'"):
        replay(tmp_path, default_uri(tmp_path), "quickstrat")


def test_live_tracker_follows_a_run_into_a_new_database(tmp_path: Path) -> None:
    folder = build_cell(tmp_path, "quickstart", CELL)
    tracker = Tracker(tmp_path, default_uri(tmp_path), interval_s=0.1)
    start_s = time.monotonic()
    tracker.start()
    assert time.monotonic() - start_s < 1
    write_steps(folder, 1, 10)
    write_checkpoint(folder, 10)
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while not (folder / "tracking.json").exists():
        assert time.monotonic() < deadline, (tmp_path / "tracking.log").read_text()
        time.sleep(0.05)
    write_steps(folder, 11, STEPS)
    write_final_files(folder)
    status = tracker.stop()
    assert (status.ok, status.reason, tracker.poll()) == (True, None, None)
    assert stored_steps(tmp_path, folder.name) == [*range(1, STEPS + 1)]
    assert stored_runs(tmp_path)[folder.name].info.status == "FINISHED"
    assert (tmp_path / "tracking.log").read_text() == ""


def test_tracker_without_runs_ends_without_error(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, default_uri(tmp_path), "quickstart", interval_s=0.1)
    tracker.start()
    assert tracker.stop().ok
