"""Tuning in the tracker: its runs are an experiment of their own; each arm's choice is a tag of the reported one."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.tracked_runs import build_experiment

from moebench.tracking.experiment_note import MAX_TAG_LENGTH, describe_tuning
from moebench.tracking.mlflow_store import MlflowStore
from moebench.tracking.replay import replay


def add_to_record(results: Path, name: str, **values: Any) -> None:
    path = results / "experiments" / f"{name}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_tuning_runs_are_tagged_and_choices_are_stored(tmp_path: Path, empty_database: Path) -> None:
    build_experiment(tmp_path)
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    chosen = {"switch": {"chosen": {"train.learning_rate": 0.002}}, "dense": {"chosen": None}}
    add_to_record(tmp_path, "quickstart", tuning={"arms": chosen})
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    replay(tmp_path, uri)
    runs = MlflowStore(uri, "quickstart").runs()
    (parent,) = [run for run in runs if not run.parent]
    assert json.loads(parent.tags["tuned"]) == {"switch": {"train.learning_rate": 0.002}, "dense": None}
    assert not any("tuning_of" in run.tags for run in runs)


def test_runs_of_a_tuning_say_whose_they_are(tmp_path: Path, empty_database: Path) -> None:
    build_experiment(tmp_path, "quickstart-tuning")
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    add_to_record(tmp_path, "quickstart-tuning", tuning_of="quickstart")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    replay(tmp_path, uri)
    runs = MlflowStore(uri, "quickstart-tuning").runs()
    assert len(runs) == 5
    assert {run.tags["tuning_of"] for run in runs} == {"quickstart"}


@pytest.mark.parametrize("tuning", [None, 3, [], {}, {"arms": 3}, {"arms": [1]}])
def test_a_record_of_another_form_has_no_tag(tuning: Any) -> None:
    assert describe_tuning({"tuning": tuning}) == {}


def test_a_tag_has_a_limit() -> None:
    arms = {f"arm {number}": {"chosen": {"train.learning_rate": 0.001}} for number in range(1000)}
    (tag,) = describe_tuning({"tuning": {"arms": arms}}).values()
    assert len(tag) == MAX_TAG_LENGTH
