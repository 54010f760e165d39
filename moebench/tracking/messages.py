"""What a replay sends of a run: points in batches that a tracker accepts, final values, tables."""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from moebench.errors import UsageError
from moebench.file_access import read_plain_file
from moebench.metrics import RESOURCES, TEST
from moebench.runs.folder import RunFolder
from moebench.runs.journal import Point
from moebench.runs.layer_series import LayerValues, iter_layer_series, read_thinned_series
from moebench.runs.result import RunResult
from moebench.tracking.metric_selection import SHOWN_RESOURCES, select_names
from moebench.tracking.mlflow_store import MAX_BATCH, MetricValue

EARLIER_FINAL = "final/"
"""Prefix of all values of a finished run in earlier versions, which had those of the test split twice."""
METRICS_TABLE, LOAD_TABLE, LAYERS_TABLE = "metrics.json", "load.json", "layers.json"
MAX_LAYER_NUMBERS = 200_000
"""Limit of the table of layers, including loads; a longer run is thinned to every second step, and so on."""
_LAYER_COLUMNS = (
    *("step", "layer", "assignments", "min", "10 %", "median", "90 %", "max over mean", "MaxVio", "dead experts"),
    *("dropped", "unserved", "entropy", "largest logit", "SD of logits", "rows per token", "FLOPs per token", "load"),
)


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
    points: list[Point], sent: Collection[tuple[str, int]], stored_names: Collection[str] = ()
) -> tuple[list[MetricValue], list[MetricValue]]:
    """Return the finite and the non-finite values whose (metric, step) is not in `sent`.

    `stored_names`: the metrics that the tracker has of the run.
    """
    is_earlier = _is_earlier(stored_names)
    values = [
        MetricValue(name=name, value=point.metrics[name], time_ms=round(1000 * point.time), step=step)
        for point in points
        for name in select_names(point)
        if (name, step := _choose_step(name, point.step, is_earlier=is_earlier)) not in sent
    ]
    # MLflow plots NaN as nothing and infinity as 1.8e308, which flattens the curve.
    return [v for v in values if isfinite(v.value)], [v for v in values if not isfinite(v.value)]


def collect_final_values(
    result: RunResult, points: list[Point], end_ms: int, stored_names: Collection[str] = ()
) -> list[MetricValue]:
    """Return the finite test metrics that the journal lacks, cost and speed of a finished run; none of another one.

    `stored_names`: the metrics that the tracker has of the run. A run that an earlier version has sent keeps its names.
    """
    if result.status != "done":
        return []
    is_earlier = _is_earlier(stored_names)
    if is_earlier:
        numbers = _prefix(EARLIER_FINAL, {**result.cost, **result.throughput, **result.metrics})
        values = {name: number for name, number in numbers.items() if name in stored_names}
    else:
        journaled = {name for point in points for name in point.metrics}
        test = Point(step=result.step, time=0.0, metrics=_prefix(TEST, result.metrics), end=0)
        values = {name: test.metrics[name] for name in select_names(test) if name not in journaled}
        resources = _prefix(RESOURCES, {**result.cost, **result.throughput})
        shown = [f"{RESOURCES}{name}" for name in SHOWN_RESOURCES]
        values |= {name: resources[name] for name in shown if name in resources}
    return [
        MetricValue(name=name, value=value, time_ms=end_ms, step=result.step if is_earlier else 0)
        for name, value in values.items()
        if isfinite(value)
    ]


def _is_earlier(stored_names: Collection[str]) -> bool:
    """Return whether an earlier version has sent the end of a run, under other names and steps."""
    return any(name.startswith(EARLIER_FINAL) for name in stored_names)


def _choose_step(name: str, step: int, *, is_earlier: bool) -> int:
    # MLflow draws bars for a metric that has a value at step 0 alone, and a lonely point for one at the last step.
    return 0 if name.startswith(TEST) and not is_earlier else step


def find_quality(points: list[Point]) -> str:
    """Return the metric that comes first on the test split, which tasks list by quality; empty for none."""
    names = (name for point in points for name in point.metrics if name.startswith(TEST))
    return next(names, "").removeprefix(TEST)


def describe_collapses(points: Collection[Point]) -> str:
    """Return step, layers and experts of the first collapse among the points, in one line; an empty text for none."""
    for point in points:
        experts = {name.split("/")[1]: value for name, value in point.metrics.items() if _COLLAPSE.fullmatch(name)}
        if experts:
            return f"step {point.step}: " + "; ".join(f"layer {name}, expert {n:.0f}" for name, n in experts.items())
    return ""


_COLLAPSE = re.compile(r"collapse/[^/]+/expert")


def build_tables(folder: RunFolder, result: RunResult, points: list[Point]) -> dict[str, dict[str, list[Any]]]:
    """Return the tables of a run by file name: the load of every expert, layers by step, every metric's last value.

    Raises UsageError for a damaged file of loads or layers.
    """
    tables = {LOAD_TABLE: _load_table(folder.loads)} if folder.loads.exists() else {}
    tables |= {LAYERS_TABLE: _layers_table(folder.layers)} if folder.layers.exists() else {}
    last = {name: (point.step, value) for point in points for name, value in point.metrics.items()}
    final = _prefix(TEST, result.metrics) | _prefix(RESOURCES, {**result.cost, **result.throughput})
    values = {name: (result.step, value) for name, value in final.items()} | last
    rows = [[name, step, value if isfinite(value) else str(value)] for name, (step, value) in values.items()]
    tables[METRICS_TABLE] = {"columns": ["metric", "step", "last value"], "data": sorted(rows, key=lambda row: row[0])}
    return tables


def _prefix(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{prefix}{name}": float(value) for name, value in values.items()}


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


def _layers_table(path: Path) -> dict[str, list[Any]]:
    first = next(iter_layer_series(path), None)
    per_step = sum(len(_LAYER_COLUMNS) + len(layer.load) for layer in first.layers.values()) if first else 1
    points = read_thinned_series(path, max(MAX_LAYER_NUMBERS // max(per_step, 1), 2))
    rows = [[point.step, name, *_list_layer(layer)] for point in points for name, layer in point.layers.items()]
    return {"columns": list(_LAYER_COLUMNS), "data": rows}


def _list_layer(layer: LayerValues) -> list[Any]:
    quantiles = [round(layer.load_quantile(share), 4) for share in (0, 0.1, 0.5, 0.9, 1)]
    shares = [round(share, 6) for share in (layer.max_violation, layer.drop_rate, layer.unserved_rate)]
    return [
        layer.assignments,
        *quantiles,
        shares[0],
        layer.dead_experts,
        *shares[1:],
        *(layer.entropy, layer.logit_max, layer.logit_std),
        *(layer.experts_per_token, layer.flops_per_token),
        list(layer.load),
    ]
