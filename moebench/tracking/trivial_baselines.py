"""The trivial baselines of an experiment in MLflow: metrics, a mark and lines of the description of its run."""

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
from moebench.tracking.mlflow_store import MetricValue, StoredRun

FAMILY = METRICS["trivial/NAME"].name
TAG = "trivial_baselines"
BEATEN = "the baseline arm is better than trivial baselines"


def collect_baselines(experiment: Mapping[str, Any], run: StoredRun) -> list[MetricValue]:
    """Return the recorded baselines of the test split, as far as the run of the experiment does not have them."""
    recorded = _find_recorded(experiment)
    if recorded is None:
        return []
    names = metric_names(tuple(baseline.name for baseline in recorded.baselines))
    values = {
        FAMILY.replace("NAME", name): baseline.values[recorded.metric]
        for baseline, name in zip(recorded.baselines, names, strict=True)
        if recorded.metric in baseline.values
    }
    now_ms = int(1000 * time.time())
    return [
        MetricValue(name=name, value=value, time_ms=now_ms, step=0)
        for name, value in values.items()
        if run.last_values.get(name) != value
    ]


def find_mark(experiment: Mapping[str, Any], results: Path) -> str:
    """Return how the baseline arm compares with the trivial baselines; empty where either is unknown."""
    recorded = _find_recorded(experiment)
    if recorded is None:
        return ""
    mean = average_arm(_read_results(experiment, results), str(experiment.get("baseline")), recorded.metric)
    is_below = is_below_trivial(mean, recorded.baselines, recorded.metric, lower_is_better=recorded.lower_is_better)
    return "" if is_below is None else BELOW_TRIVIAL if is_below else BEATEN


def list_baselines(experiment: Mapping[str, Any]) -> str:
    """Return the baselines as a list in Markdown; empty if there are none."""
    recorded = _find_recorded(experiment)
    if recorded is None:
        return ""
    values = [(baseline, baseline.values.get(recorded.metric)) for baseline in recorded.baselines]
    lines = [
        f"- {baseline.name}{' (the reference)' if baseline.is_reference else ''}: {value:.4f}"
        for baseline, value in values
        if value is not None
    ]
    return "\n".join([f"Trivial baselines, {recorded.metric} on the test split:", "", *lines])


def _find_recorded(experiment: Mapping[str, Any]) -> StoredBaselines | None:
    return next((each for each in read_recorded(experiment) if each.evaluation.split == "test"), None)


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
