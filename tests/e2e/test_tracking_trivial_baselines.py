"""Trivial baselines in MLflow: on the run of the experiment, once, and with the mark."""

import json
import shutil
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from support.tracked_runs import build_experiment

from moebench.runs.trivial_baselines import EvaluationSet, StoredBaselines
from moebench.tasks.baselines.baseline import TrivialBaseline
from moebench.tracking.address import default_uri
from moebench.tracking.replay import replay

MARK = "below trivial baselines: a ranking at this size says little"


def write_baselines(results: Path, reference: float) -> None:
    path = results / "experiments" / "quickstart.json"
    evaluation = EvaluationSet(task="language", data_digest="d", eval_digest="e", split="test")
    baselines = (
        TrivialBaseline(
            name="order-3 n-gram", meaning="counts", values={"bits_per_byte": reference}, is_reference=True
        ),
        TrivialBaseline(name="bz2 -9", meaning="compressed", values={"bits_per_byte": 1.5}),
    )
    stored = StoredBaselines(evaluation=evaluation, metric="bits_per_byte", lower_is_better=True, baselines=baselines)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trivial_baselines": [stored.to_dict()]}))


def parent_of(results: Path) -> Any:
    client = MlflowClient(default_uri(results))
    experiment = client.get_experiment_by_name("quickstart")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    return next(run for run in runs if run.data.tags["mlflow.moebench.cell"] == "experiment")


def test_baselines_are_sent_once_and_change_with_the_record(tmp_path: Path, empty_database: Path) -> None:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    build_experiment(tmp_path)  # bits per byte of dense: about 2.03
    replay(tmp_path, default_uri(tmp_path))
    assert not any(name.startswith("trivial/") for name in parent_of(tmp_path).data.metrics)
    write_baselines(tmp_path, reference=1.9)
    for _ in range(2):
        replay(tmp_path, default_uri(tmp_path))
    parent = parent_of(tmp_path)
    assert parent.data.metrics == {"trivial/order-3 n-gram": 1.9, "trivial/bz2 -9": 1.5}
    assert parent.data.tags["trivial_baselines"] == MARK
    note = parent.data.tags["mlflow.note.content"]
    assert note.startswith(
        f"**Does switch beat dense?**\n\n{MARK}\n\nTrivial baselines, bits_per_byte on the test split:"
    )
    assert "- order-3 n-gram (the reference): 1.9000" in note
    client = MlflowClient(default_uri(tmp_path))
    assert len(client.get_metric_history(parent.info.run_id, "trivial/bz2 -9")) == 1
    write_baselines(tmp_path, reference=2.5)
    client.set_tag(parent.info.run_id, "mlflow.note.content", "my own text")
    replay(tmp_path, default_uri(tmp_path))
    parent = parent_of(tmp_path)
    assert parent.data.metrics["trivial/order-3 n-gram"] == 2.5
    assert parent.data.tags["trivial_baselines"] == "the baseline arm is better than trivial baselines"
    assert parent.data.tags["mlflow.note.content"] == "my own text"
