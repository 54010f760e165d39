"""Layers of a run in a real MLflow database: a table and an alarm, and no more charts."""

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from support.tracked_runs import build_cell, write_final_files

from moebench.runs.folder import RunFolder
from moebench.runs.layer_series import LayerValues
from moebench.runs.recorder import RunRecorder
from moebench.tracking.address import default_uri
from moebench.tracking.replay import replay

CELL = {"id": "0" * 12, "arm": "a", "seed": 0}
COUNTS = {"tokens": 8, "dropped": 1, "rerouted": 0, "unserved": 0, "experts_per_token": 1.0, "flops_per_token": 1e3}
LAYER = LayerValues(load=(1, 4, 3, 0), **COUNTS, entropy=0.5, logit_max=2.0, logit_std=1.0)
COLLAPSE = {"collapse/layers": 1.0, "collapse/1/expert": 3.0, "collapse/1/num_experts": 1.0, "collapse/1/share": 0.97}
NAME_OF_ALARM = "step 20: layer 1, expert 3"


def rows(results: Path, query: str) -> list[Any]:
    with closing(sqlite3.connect(results / "mlflow.db")) as database:
        return database.execute(query).fetchall()


@pytest.fixture
def folder(tmp_path: Path, empty_database: Path) -> RunFolder:
    """A run of two layers that is trained, without a checkpoint; one layer has collapsed. And an empty tracker."""
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    folder = RunFolder(build_cell(tmp_path, "quickstart", CELL))
    with RunRecorder(folder) as recorder:
        for step in (1, 10, 20):
            recorder.append(step, {"loss/task": 3.0})
            recorder.record_layers(step, {"0": LAYER, "1": LAYER})
        recorder.append(20, COLLAPSE)
    return folder


def test_a_collapse_is_named_while_the_run_trains(tmp_path: Path, folder: RunFolder) -> None:
    uri = default_uri(tmp_path)
    replay(tmp_path, uri, live=True)
    assert rows(tmp_path, "select value from tags where key = 'collapse'") == [(NAME_OF_ALARM,)]
    assert rows(tmp_path, "select key from metrics") == []  # points after the last checkpoint may be repeated
    write_final_files(folder.path)
    replay(tmp_path, uri)
    assert rows(tmp_path, "select value from tags where key = 'collapse'") == [(NAME_OF_ALARM,)]
    assert rows(tmp_path, "select key, step, value from metrics where key like 'collapse%'") == [
        ("collapse/layers", 20, 1.0)
    ]


def test_layers_are_a_table(tmp_path: Path, folder: RunFolder) -> None:
    write_final_files(folder.path)
    replay(tmp_path, default_uri(tmp_path))
    (file,) = (tmp_path / "mlartifacts").rglob("layers.json")
    table = json.loads(file.read_text())
    records = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [(record["step"], record["layer"]) for record in records] == [
        (step, layer) for step in (1, 10, 20) for layer in "01"
    ]
    expected = {"min": 0.0, "median": 1.0, "max over mean": 2.0, "MaxVio": 1.0, "dead experts": 1, "dropped": 0.125}
    assert expected.items() <= records[0].items()
    assert records[0]["load"] == [1, 4, 3, 0]
    (artifacts,) = rows(tmp_path, "select value from tags where key = 'mlflow.loggedArtifacts'")[0]
    assert {"path": "layers.json", "type": "table"} in json.loads(artifacts)
