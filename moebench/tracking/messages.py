"""The messages of a replay: points in batches that a tracker accepts, final values, the table of loads."""

import json
from collections.abc import Iterator
from math import isfinite
from pathlib import Path

from moebench.errors import UsageError
from moebench.runs.journal import Point
from moebench.runs.result import RunResult
from moebench.tracking.mlflow_store import MAX_BATCH, MlflowStore, Value


def batches(points: list[Point]) -> Iterator[list[Point]]:
    """Yield the points in runs of at most MAX_BATCH values."""
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


def values_of(points: list[Point], sent: set[tuple[str, int]]) -> tuple[list[Value], list[Value]]:
    """Return the values that the tracker lacks: the finite ones, and those that are not."""
    values = [
        Value(name=name, value=number, time_ms=round(1000 * point.time), step=point.step)
        for point in points
        for name, number in point.metrics.items()
        if (name, point.step) not in sent
    ]
    # MLflow draws NaN as nothing and infinity as 1.8e308, which flattens the chart.
    return [v for v in values if isfinite(v.value)], [v for v in values if not isfinite(v.value)]


def final_values(result: RunResult, end_ms: int) -> list[Value]:
    """Return the final metrics, cost and throughput of a finished run."""
    if result.status != "done":
        return []
    # One group: MLflow opens a section of charts for each prefix.
    ends = {**result.cost, **result.throughput, **result.metrics}
    named = {f"final/{key}": float(x) for key, x in ends.items()}
    step = result.step
    return [Value(name=k, value=x, time_ms=end_ms, step=step) for k, x in named.items() if isfinite(x)]


def send_load(store: MlflowStore, run_id: str, path: Path) -> None:
    """Send the load of every expert at every evaluation as one table."""
    if not path.exists():
        return
    try:
        # A resumed run may evaluate a step again: the later line counts.
        lines = {line["step"]: line["layers"] for line in map(json.loads, path.read_text().splitlines())}
        rows = [
            [step, layer, sum(load), round(max(load) * len(load) / max(sum(load), 1), 4), load]
            for step, layers in sorted(lines.items())
            for layer, load in layers.items()  # in the order of the model: 0, 1 ... or encoder.0 ... decoder.0
        ]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"{path}: not a record of load ({error})") from error
    columns = ["step", "layer", "assignments", "max over mean", "load"]
    store.log_table(run_id, {"columns": columns, "data": rows}, "load.json")
