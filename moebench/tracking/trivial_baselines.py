"""The trivial baselines of an experiment in MLflow: metrics, a tag and the description of the experiment's run."""

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moebench.errors import UsageError
from moebench.metrics import METRICS
from moebench.runs.folder import RunFolder
from moebench.runs.result import RunResult
from moebench.runs.trivial_baselines import BELOW_TRIVIAL, StoredBaselines, average_arm, is_below_trivial, read_recorded
from moebench.tasks.domain_metrics import metric_names
from moebench.tracking.mlflow_store import MetricValue, MlflowStore, StoredRun

FAMILY = METRICS["trivial/NAME"].name
TAG, NOTE = "moebench.trivial_baselines", "mlflow.note.content"
BEATEN = "the baseline arm is better than trivial baselines"


def send_trivial_baselines(store: MlflowStore, run: StoredRun, experiment: Mapping[str, Any], results: Path) -> None:
    """Send the recorded baselines of the test split to the run of the experiment, as far as it does not have them."""
    recorded = next((each for each in read_recorded(experiment) if each.evaluation.split == "test"), None)
    if recorded is None:
        return
    metric = recorded.metric
    values = {
        name: baseline.values[metric]
        for baseline, name in zip(recorded.baselines, _metric_names(recorded), strict=True)
        if metric in baseline.values
    }
    now_ms = int(1000 * time.time())
    metrics = [
        MetricValue(name=name, value=value, time_ms=now_ms, step=0)
        for name, value in values.items()
        if run.last_values.get(name) != value
    ]
    mean = average_arm(_read_results(experiment, results), str(experiment.get("baseline")), metric)
    is_below = is_below_trivial(mean, recorded.baselines, metric, lower_is_better=recorded.lower_is_better)
    mark = "" if is_below is None else BELOW_TRIVIAL if is_below else BEATEN
    notes = {text: _describe(experiment, recorded, text) for text in ("", BELOW_TRIVIAL, BEATEN)}
    question = str(experiment.get("question") or "")
    # A description that somebody has edited in the tracker is theirs.
    is_ours = run.tags.get(NOTE, "") in ("", question, *notes.values())
    tags = {TAG: mark} | ({NOTE: notes[mark]} if is_ours else {})
    changed = {key: value for key, value in tags.items() if run.tags.get(key, "") != value}
    if metrics or changed:
        store.log(run.id, metrics, changed)


def _metric_names(recorded: StoredBaselines) -> list[str]:
    names = metric_names(tuple(baseline.name for baseline in recorded.baselines))
    return [FAMILY.replace("NAME", name) for name in names]


def _describe(experiment: Mapping[str, Any], recorded: StoredBaselines, mark: str) -> str:
    """Return the description of the experiment's run, in Markdown."""
    metric = recorded.metric
    lines = [
        f"- {baseline.name}{' (the reference)' if baseline.is_reference else ''}: {baseline.values[metric]:.4f}"
        for baseline in recorded.baselines
        if metric in baseline.values
    ]
    table = "\n".join([f"Trivial baselines, {metric} on the test split:", "", *lines])
    return "\n\n".join(part for part in (str(experiment.get("question") or ""), mark, table) if part)


def _read_results(experiment: Mapping[str, Any], results: Path) -> list[RunResult]:
    """Return the results of the baseline arm; damaged ones, which are reported elsewhere, are left out."""
    run_results = []
    for cell in experiment["cells"]:
        if cell.get("arm") == experiment.get("baseline"):
            with contextlib.suppress(UsageError):
                result = RunFolder.of(results, cell["id"]).read_result()
                run_results += [] if result is None else [result]
    arm = str(experiment.get("baseline"))
    return [RunResult.from_dict(result.to_dict() | {"arm": arm}) for result in run_results]
