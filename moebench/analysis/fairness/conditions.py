"""Under which conditions the time of a run was measured: its hardware, the cells beside it, whether it was resumed."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moebench.file_access import read_plain_json
from moebench.runs.attempts import Attempt, read_attempts
from moebench.runs.folder import RunFolder, list_run_folders
from moebench.runs.journal import Point

HARDWARE = ("processor", "device", "cores", "threads")
"""Keys of environment.json that decide how fast a step is."""
MAX_LOAD_RATIO = 1.2
"""Largest over smallest mean number of cells at a time whose times are compared: the last cell of a grid is alone for
a part of its time."""
MAX_TIME_S = 1e12
"""Longest duration that is believed: thirty thousand years."""
TRAINED = ("done", "failed", "stopped")
Spans = Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class RunConditions:
    """How the time of one run was measured."""

    hardware: str
    """Processor, device, cores and threads; empty where they are not recorded."""
    cells_at_a_time: float | None
    """Mean number of cells of this results folder that were trained at the same time, with this one; None: unknown."""
    num_starts: int
    """1 unless the run was stopped and resumed."""


def read_conditions(results: Path, journals: Mapping[str, Sequence[Point]]) -> dict[str, RunConditions]:
    """Return the conditions of runs, by id; `journals`: id -> points, which date a run without recorded attempts.

    Other programs, and cells of other results folders, are not known.
    """
    attempts = {folder.path.name: _read_attempts(folder) for folder in list_run_folders(results)}
    spans = {
        run_id: [(attempt.started_at, attempt.started_at + attempt.seconds) for attempt in of_run]
        for run_id, of_run in attempts.items()
    }
    for run_id, points in journals.items():
        times = [point.time for point in points if _is_time(point.time)]
        if not spans.get(run_id) and times and max(times) > min(times):
            spans[run_id] = [(min(times), max(times))]
    return {
        run_id: RunConditions(
            hardware=_read_hardware(RunFolder.of(results, run_id)),
            cells_at_a_time=_compute_load(run_id, spans),
            num_starts=max(len(attempts.get(run_id, ())), 1),
        )
        for run_id in journals
    }


def find_time_problem(conditions: Collection[RunConditions]) -> str:
    """Return why the times of runs cannot be compared, as a clause; empty if they can."""
    hardware = sorted({run.hardware for run in conditions})
    if not all(hardware):
        return "the hardware of a run is not recorded"
    if len(hardware) > 1:
        return f"measured on different hardware ({'; '.join(hardware)})"
    num_resumed = sum(run.num_starts > 1 for run in conditions)
    if num_resumed:
        return f"{num_resumed} of {len(conditions)} runs were stopped and resumed"
    loads = [run.cells_at_a_time for run in conditions if run.cells_at_a_time is not None]
    if len(loads) < len(conditions):
        return "it is not recorded when a run was trained"
    if max(loads) > MAX_LOAD_RATIO * min(loads):
        return (
            f"measured with {min(loads):.1f} to {max(loads):.1f} cells at a time (`run --jobs 1` trains one after the"
            " other)"
        )
    return ""


def _read_attempts(folder: RunFolder) -> list[Attempt]:
    """Return the attempts that trained; numbers of a file that others can write are checked."""
    return [
        attempt
        for attempt in read_attempts(folder.attempts)
        if attempt.status in TRAINED
        and _is_time(attempt.started_at)
        and _is_time(attempt.seconds)
        and attempt.seconds > 0
    ]


def _is_time(value: object) -> bool:
    """Return whether a value from a file is a number of seconds that sums stay finite with."""
    return type(value) in (int, float) and 0 <= value < MAX_TIME_S  # type: ignore[operator]


def _read_hardware(folder: RunFolder) -> str:
    try:
        environment = read_plain_json(folder.environment)
    except (OSError, ValueError):
        return ""
    if not isinstance(environment, dict):
        return ""
    texts = {key: str(environment[key])[:80] for key in HARDWARE if environment.get(key)}
    units = {"cores": "cores", "threads": "threads"}
    return ", ".join(f"{text} {units[key]}" if key in units else text for key, text in texts.items())


def _compute_load(run_id: str, spans: Mapping[str, Spans]) -> float | None:
    """Return the mean number of runs over the time in which a run was trained."""
    ours = spans.get(run_id)
    if not ours:
        return None
    others = np.array([span for other, of_run in spans.items() if other != run_id for span in of_run])
    others = others.reshape(-1, 2)
    shared_s = sum(
        float(np.clip(np.minimum(end, others[:, 1]) - np.maximum(start, others[:, 0]), 0, None).sum())
        for start, end in ours
    )
    return 1 + shared_s / sum(end - start for start, end in ours)
