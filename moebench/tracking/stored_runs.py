"""The runs of a results folder in any tracker: find them, compare them with their journals, delete."""

import math
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from moebench.errors import UsageError
from moebench.tracking.address import sqlite_path
from moebench.tracking.bookkeeping import CELL, RESULTS
from moebench.tracking.database import read_points
from moebench.tracking.messages import collect_final_values, collect_unsent_values
from moebench.tracking.mlflow_store import MlflowStore, StoredRun
from moebench.tracking.source import RunSource, list_recorded_experiments, read_results_id

EXPERIMENT = "experiment"
"""In place of the id of a cell: the parent run."""
STATUSES = {"done": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
"""MLflow's status of a run that has ended, by that of its result."""


def list_stored_runs(store: MlflowStore, results: Path) -> list[StoredRun]:
    """Return the runs that this results folder has sent, the parent run included.

    Other folders may have sent the same cells to the same tracker. Runs without a mark are from an earlier version.
    """
    path, identity = sqlite_path(store.uri), read_results_id(results)
    # All runs of the database inside the results folder are its own, also if the file with the id was lost.
    is_own_database = path is not None and path.parent.resolve() == results.resolve()
    return [run for run in store.runs() if is_own_database or run.tags.get(RESULTS, identity) == identity]


def find_stored_runs(store: MlflowStore, results: Path) -> dict[str, StoredRun]:
    """Return the runs that this results folder has sent, by cell; `EXPERIMENT` for the parent run."""
    return {run.tags.get(CELL, ""): run for run in list_stored_runs(store, results)}


def was_trained_again(source: RunSource, run: StoredRun) -> bool:
    """Return whether the tracker has final values of an earlier training of a cell that is done."""
    if source.result is None:
        return False
    for value in collect_final_values(source.result, [], 0, run.last_values.keys()):
        stored = run.last_values.get(value.name)
        if stored is not None and not math.isclose(stored, value.value, rel_tol=1e-9):
            return True
    return False


@dataclass(frozen=True, kw_only=True)
class RunAudit:
    """Differences between the journal and result of a run, and what a tracker has of it."""

    cell_id: str
    """`EXPERIMENT`: the parent run."""
    experiment: str
    run_id: str
    """Id in the tracker; empty if it does not have the run."""
    doubled: tuple[tuple[str, int], ...] = ()
    """(metric, step) that the tracker has more than once."""
    missing: tuple[tuple[str, int], ...] = ()
    """(metric, step) that should have been sent and were not."""
    end_status: str = ""
    """MLflow's status that a run should have which is shown as running and is not; empty if nothing is wrong."""


def audit_runs(results: Path, uri: str) -> list[RunAudit]:
    """Compare all runs of a results folder with a tracker; change nothing.

    Returns one entry for each run that differs. Runs that are being trained or whose own files are damaged are left
    out. Raises TrackerError when the tracker cannot be used.
    """
    audits = [_audit_experiment(store, results, name) for store, name in _open_stores(results, uri)]
    return [audit for part in audits for audit in part]


def delete_runs(results: Path, uri: str, cell_ids: Collection[str], experiment: str | None = None) -> int:
    """Move the runs of some cells to the trash of a tracker, from where MLflow can restore them; return their number.

    Of one experiment, or of all. Raises TrackerError when the tracker cannot be used.
    """
    number = 0
    for store, name in _open_stores(results, uri):
        for run in list_stored_runs(store, results) if experiment in (None, name) else ():
            if run.tags.get(CELL) in cell_ids:
                store.delete(run.id)
                number += 1
    return number


def _open_stores(results: Path, uri: str) -> Iterator[tuple[MlflowStore, str]]:
    path = sqlite_path(uri)
    for name in list_recorded_experiments(results) if path is None or path.exists() else ():
        yield MlflowStore(uri, name, read_only=True), name


def _audit_experiment(store: MlflowStore, results: Path, name: str) -> list[RunAudit]:
    stored = find_stored_runs(store, results)
    sources = [RunSource.of(results, cell["id"]) for cell in list_recorded_experiments(results)[name]["cells"]]
    is_running = {source.id: source.folder.is_being_trained() for source in sources}
    audits = [
        _audit_run(store, source, stored.get(source.id))
        for source in sources
        if not is_running[source.id] and source.has_started
    ]
    parent = stored.get(EXPERIMENT)
    if parent and parent.status == "RUNNING" and not any(is_running.values()):
        audits.append(RunAudit(cell_id=EXPERIMENT, experiment=name, run_id=parent.id, end_status="KILLED"))
    return [audit for audit in audits if audit.doubled or audit.missing or audit.end_status]


def _audit_run(store: MlflowStore, source: RunSource, run: StoredRun | None) -> RunAudit:
    run_id, logged = run.id if run else "", Counter[tuple[str, int]]()
    if run:
        path = sqlite_path(store.uri)
        logged = read_points(path, run.id) if path else store.list_logged(run.id, run.last_steps.keys())
    end_status = _find_end_status(source) if run and run.status == "RUNNING" else ""
    return RunAudit(
        cell_id=source.id,
        experiment=store.experiment,
        run_id=run_id,
        doubled=tuple(sorted(key for key, number in logged.items() if number > 1)),
        missing=tuple(sorted(_list_sendable(source, run.last_values.keys() if run else ()) - logged.keys())),
        end_status=end_status,
    )


def _find_end_status(source: RunSource) -> str:
    try:
        return STATUSES.get(source.result.status, "FAILED") if source.result else "KILLED"
    except UsageError:
        return "FAILED"


def _list_sendable(source: RunSource, stored_names: Collection[str]) -> set[tuple[str, int]]:
    """Return metric and step of each value that a tracker should have; none where the run itself is damaged."""
    try:
        points = source.read_final_points()
        values, _ = collect_unsent_values(points, (), stored_names)
        values += collect_final_values(source.result, points, 0, stored_names) if source.result else []
    except UsageError:
        return set()
    return {(value.name, value.step) for value in values}
