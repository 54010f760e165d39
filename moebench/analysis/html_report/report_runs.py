"""What a report reads of each run besides its result: evaluations, final loads, environment."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Any

from moebench.errors import UsageError
from moebench.file_access import parse_json, read_plain_json
from moebench.runs.cell import Cell
from moebench.runs.folder import RunFolder
from moebench.runs.journal import Point, parse_journal
from moebench.runs.layer_series import LayerPoint, read_thinned_series
from moebench.runs.result import RunResult

MAX_LAYERS, MAX_EXPERTS = 1024, 65_536
"""Larger tables of loads are refused."""
MAX_POINTS = 100
"""Largest number of points of a series of layers."""
Loads = Mapping[str, Sequence[float]]
"""Layer -> assignments of each expert."""


@dataclass(frozen=True, kw_only=True)
class ReportRun:
    """One run, done or not; parts that are missing or damaged are empty."""

    arm: str
    seed: int
    result: RunResult | None = None
    points: Sequence[Point] = ()
    """Evaluations on the validation split."""
    loads: Loads = field(default_factory=dict)
    """Loads of the last evaluation."""
    series: Sequence[LayerPoint] = ()
    """Layers at logged steps, thinned; of the first run of each arm alone."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    """Why parts are missing, one line each."""


def read_runs(cells: Sequence[Cell], results: Path, metric: str) -> list[ReportRun]:
    """Read the runs of the cells that have been started; `metric`: the one whose evaluations are read."""
    folders = [(cell, RunFolder.of(results, cell.id)) for cell in cells]
    started = [(cell, folder) for cell, folder in folders if folder.cell.exists()]
    runs = [_read_run(cell, folder, f"eval/{metric}") for cell, folder in started]
    with_series: set[str] = set()
    for index, (cell, folder) in enumerate(started):
        if cell.arm not in with_series and folder.layers.exists():
            with_series.add(cell.arm)
            runs[index] = _add_series(runs[index], folder)
    return runs


def _read_run(cell: Cell, folder: RunFolder, metric: str) -> ReportRun:
    problems: list[str] = []
    parts: dict[str, Any] = {}
    try:
        parts["result"] = folder.read_result()
    except UsageError as error:
        problems.append(str(error))
    readers = {"points": _read_points, "loads": _read_loads, "environment": _read_environment}
    for name, read in readers.items():
        try:
            parts[name] = read(folder, parts.get("result"), metric)
        except UsageError as error:
            problems.append(str(error))
    return ReportRun(arm=cell.arm, seed=cell.seed, problems=tuple(problems), **parts)


def _add_series(run: ReportRun, folder: RunFolder) -> ReportRun:
    try:
        folder.require_unchanged(folder.layers)
        return replace(run, series=read_thinned_series(folder.layers, MAX_POINTS))
    except UsageError as error:
        return replace(run, problems=(*run.problems, str(error)))


def _read_points(folder: RunFolder, result: RunResult | None, metric: str) -> list[Point]:
    content = folder.read_record(folder.journal, result)
    return [point for point in parse_journal(folder.journal, content or b"") if metric in point.metrics]


def _read_loads(folder: RunFolder, result: RunResult | None, metric: str) -> Loads:
    lines = (folder.read_record(folder.loads, result) or b"").splitlines()
    if not lines:
        return {}
    try:
        return dict(_check_layers(parse_json(lines[-1])["layers"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{folder.loads}: its last line is not a table of loads ({error})") from error


def _check_layers(layers: Mapping[str, Any]) -> Iterator[tuple[str, list[float]]]:
    if len(layers) > MAX_LAYERS:
        raise ValueError(f"{len(layers)} layers (allowed: at most {MAX_LAYERS})")
    for name, load_E in layers.items():
        if not isinstance(load_E, list) or not 0 < len(load_E) <= MAX_EXPERTS:
            raise ValueError(f"layer {name[:40]!r} has no list of 1 to {MAX_EXPERTS} numbers")
        if any(isinstance(load, bool) or not isinstance(load, int | float) for load in load_E):
            raise ValueError(f"layer {name[:40]!r} has a load that is not a number")
        if not all(0 <= load < 1e18 and isfinite(load) for load in load_E):
            raise ValueError(f"layer {name[:40]!r} has a load that is negative or not finite")
        yield name, [float(load) for load in load_E]


def _read_environment(folder: RunFolder, result: RunResult | None, metric: str) -> dict[str, Any]:
    try:
        environment = read_plain_json(folder.environment)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder.environment}: cannot be read ({error})") from error
    return environment if isinstance(environment, dict) else {}
