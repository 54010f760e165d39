"""What a replay sends: points in batches that a tracker accepts, final values, tables of loads and of all domains."""

import json
from collections.abc import Collection, Iterator, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from moebench.errors import UsageError
from moebench.file_access import read_plain_file
from moebench.runs.journal import Point
from moebench.runs.result import RunResult
from moebench.tracking.metric_limit import select_names
from moebench.tracking.mlflow_store import MAX_BATCH, MetricValue

MAX_TAG_LENGTH = 4000
"""Characters of a tag that every tracker takes."""


def describe_tuning(experiment: Mapping[str, Any]) -> dict[str, str]:
    """Return the tag with what each arm of an experiment has chosen in tuning; none without tuning."""
    tuning = experiment.get("tuning")
    arms = tuning.get("arms") if isinstance(tuning, Mapping) else None
    if not isinstance(arms, Mapping):
        return {}
    chosen = {str(arm): choice.get("chosen") for arm, choice in arms.items() if isinstance(choice, Mapping)}
    return {"moebench.tuned": json.dumps(chosen)[:MAX_TAG_LENGTH]}


def split_into_batches(points: list[Point]) -> Iterator[list[Point]]:
    """Split the points into batches of at most `MAX_BATCH` values; a point with more is its own batch."""
    batch: list[Point] = []
    size = 0
    for point in points:
        if batch and size + len(point.metrics) > MAX_BATCH:
            yield batch
            batch, size = [], 0
        batch.append(point)
        size += len(point.metrics)
    if batch:
        yield batch


def collect_unsent_values(
    points: list[Point], sent: Collection[tuple[str, int]]
) -> tuple[list[MetricValue], list[MetricValue]]:
    """Return the finite and the non-finite values whose (metric, step) is not in `sent`."""
    values = [
        MetricValue(name=name, value=point.metrics[name], time_ms=round(1000 * point.time), step=point.step)
        for point in points
        for name in select_names(point)
        if (name, point.step) not in sent
    ]
    # MLflow plots NaN as nothing and infinity as 1.8e308, which flattens the curve.
    return [v for v in values if isfinite(v.value)], [v for v in values if not isfinite(v.value)]


def collect_final_values(result: RunResult, points: list[Point], end_ms: int) -> list[MetricValue]:
    """Return the finite metrics, cost and throughput of a finished run; none for a run that is not done."""
    if result.status != "done":
        return []
    # One prefix for all: MLflow shows a section of charts for each.
    left_out = {name.removeprefix("test/") for name in list_left_out(points)}
    numbers = {**result.cost, **result.throughput, **result.metrics}
    values = {f"final/{name}": float(number) for name, number in numbers.items() if name not in left_out}
    return [
        MetricValue(name=name, value=value, time_ms=end_ms, step=result.step)
        for name, value in values.items()
        if isfinite(value)
    ]


def list_left_out(points: list[Point]) -> list[str]:
    """Return the names of the metrics that are too many for a tracker, in the order of the journal."""
    names: dict[str, None] = {}
    for point in points:
        names |= dict.fromkeys(point.metrics.keys() - set(select_names(point)))
    return [*names]


def build_tables(loads: Path, points: list[Point]) -> dict[str, dict[str, list[Any]]]:
    """Return the tables of a run by file name: the load of every expert, and the last value of all metrics if needed.

    Raises UsageError for a damaged file of loads.
    """
    tables = {"load.json": _load_table(loads)} if loads.exists() else {}
    if list_left_out(points):
        last = {name: (point.step, value) for point in points for name, value in point.metrics.items()}
        tables["metrics.json"] = {
            "columns": ["metric", "step", "value"],
            "data": [[name, step, value if isfinite(value) else str(value)] for name, (step, value) in last.items()],
        }
    return tables


def _load_table(path: Path) -> dict[str, list[Any]]:
    try:
        # A resumed run may have evaluated a step twice: the later line counts.
        lines = {line["step"]: line["layers"] for line in map(json.loads, read_plain_file(path, None).splitlines())}
        rows = [
            [step, layer, sum(load), round(max(load) * len(load) / max(sum(load), 1), 4), load]
            for step, layers in sorted(lines.items())
            for layer, load in layers.items()
        ]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise UsageError(f"{path}: not a record of load ({error})") from error
    return {"columns": ["step", "layer", "assignments", "max over mean", "load"], "data": rows}
