"""What a replay sends: points in batches that a tracker accepts, final values, the table of expert loads."""

import json
from collections.abc import Iterator
from math import isfinite
from pathlib import Path

from moebench.errors import UsageError
from moebench.runs.journal import Point
from moebench.runs.result import RunResult
from moebench.tracking.mlflow_store import MAX_BATCH, MetricValue, MlflowStore


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
    points: list[Point], sent: set[tuple[str, int]]
) -> tuple[list[MetricValue], list[MetricValue]]:
    """Return the finite and the non-finite values whose (metric, step) is not in `sent`."""
    values = [
        MetricValue(name=name, value=number, time_ms=round(1000 * point.time), step=point.step)
        for point in points
        for name, number in point.metrics.items()
        if (name, point.step) not in sent
    ]
    # MLflow plots NaN as nothing and infinity as 1.8e308, which flattens the curve.
    return [v for v in values if isfinite(v.value)], [v for v in values if not isfinite(v.value)]


def collect_final_values(result: RunResult, end_ms: int) -> list[MetricValue]:
    """Return the finite metrics, cost and throughput of a finished run; none for a run that is not done."""
    if result.status != "done":
        return []
    # One prefix for all: MLflow shows a section of charts for each.
    numbers = {**result.cost, **result.throughput, **result.metrics}
    values = {f"final/{name}": float(number) for name, number in numbers.items()}
    return [
        MetricValue(name=name, value=value, time_ms=end_ms, step=result.step)
        for name, value in values.items()
        if isfinite(value)
    ]


def send_load_table(store: MlflowStore, run_id: str, path: Path) -> None:
    """Send the load of every expert at every evaluation as one table."""
    if not path.exists():
        return
    try:
        # A resumed run may have evaluated a step twice: the later line counts.
        lines = {line["step"]: line["layers"] for line in map(json.loads, path.read_text().splitlines())}
        rows = [
            [step, layer, sum(load), round(max(load) * len(load) / max(sum(load), 1), 4), load]
            for step, layers in sorted(lines.items())
            for layer, load in layers.items()
        ]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"{path}: not a record of load ({error})") from error
    columns = ["step", "layer", "assignments", "max over mean", "load"]
    store.log_table(run_id, {"columns": columns, "data": rows}, "load.json")
