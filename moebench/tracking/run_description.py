"""What a run is, for a tracker: every resolved setting as a parameter, tags to search and group by, a description."""

import platform
import re
from collections.abc import Iterator, Mapping
from typing import Any

from moebench.runs.folder import read_json
from moebench.runs.result import RunResult
from moebench.tracking.bookkeeping import CELL, DATA_DIGEST, GIT_DIRTY, RESULTS
from moebench.tracking.source import RunSource

DESCRIPTION_VERSION = "2"
"""Raise it when parameters, tags or dataset of a run change: those of stored runs are then completed."""
MAX_PARAMS, MAX_PARAM_LENGTH, MAX_NAME_LENGTH = 400, 500, 250
"""Parameters of a run, and characters of a value and a name, that every tracker takes."""
_MAX_DEPTH = 16
_NOT_ALLOWED = re.compile(r"[^A-Za-z0-9_\-. :]")
_GIT_COMMIT, _SOURCE, _SOURCE_TYPE = "mlflow.source.git.commit", "mlflow.source.name", "mlflow.source.type"


def list_params(cell: Mapping[str, Any]) -> dict[str, str]:
    """Return the resolved configuration with dotted names, the settings that the experiment varies first."""
    varies = cell.get("varies")
    params = dict(_flatten(varies, "")) if isinstance(varies, Mapping) else {}
    params = {**params, **{name: value for name, value in _flatten(cell["config"], "") if name not in params}}
    return dict([*params.items()][:MAX_PARAMS])


def _flatten(values: Mapping[str, Any], prefix: str, depth: int = 1) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value and depth < _MAX_DEPTH:
            yield from _flatten(value, f"{name}.", depth + 1)
        else:
            # A name must not look like a path to elsewhere, and a value must not be empty.
            plain = _NOT_ALLOWED.sub("_", name).strip(". ")[:MAX_NAME_LENGTH]
            yield plain or "_", str(value)[:MAX_PARAM_LENGTH] or "''"


def build_tags(source: RunSource, experiment: str, results_id: str) -> dict[str, str]:
    """Return the tags of a run: visible ones to search and group by, hidden ones for the sender."""
    path = source.folder.environment
    cell, environment = source.cell, read_json(path) if path.exists() else {}
    tags = {
        "arm": cell["arm"],
        "seed": cell["seed"],
        "experiment": experiment,
        "family": cell.get("family"),
        "layout": _read_name(cell, "layout"),
        "task": _read_name(cell, "task"),
        "host": environment.get("host", platform.node()),
        CELL: source.id,
        RESULTS: results_id,
        DATA_DIGEST: cell["data"]["digest"],
        GIT_DIRTY: environment.get("git_dirty"),
        _GIT_COMMIT: environment.get("git_commit"),
        _SOURCE: f"moebench run {experiment}",
        _SOURCE_TYPE: "LOCAL",
    }
    return {key: str(value) for key, value in tags.items() if value is not None}


def build_note(source: RunSource, experiment: str, metric: str = "") -> str:
    """Return the description of a run in Markdown; `metric`: what arms are compared by, if known."""
    cell, result = source.cell, source.result
    facts = [
        f"router `{_read_name(cell, 'router')}`" + (f" ({cell['family']})" if cell.get("family") else ""),
        f"layout `{_read_name(cell, 'layout')}`",
        f"task `{_read_name(cell, 'task')}`",
    ]
    lines = [f"**{cell['arm']}**, seed {cell['seed']}, of the experiment `{experiment}`: {', '.join(facts)}."]
    lines += [_describe_result(result, metric)] if result else []
    lines.append(f"Files: `runs/{source.id}` of the results folder; every metric: the table `metrics.json`.")
    return "\n\n".join(lines)


def _describe_result(result: RunResult, metric: str) -> str:
    marks = f" Marks: {', '.join(result.marks)}." if result.marks else ""
    if result.status != "done":
        return f"Ended at step {result.step}, {result.status}: {result.error or 'no reason recorded'}{marks}"
    value = result.metrics.get(metric)
    quality = "" if value is None else f": {metric.replace('_', ' ')} {value:.4f} on the test split"
    return f"Done after {result.step} steps{quality}.{marks}"


def _read_name(cell: Mapping[str, Any], component: str) -> str | None:
    values = cell["config"].get(component)
    return str(values["name"]) if isinstance(values, Mapping) and "name" in values else None
