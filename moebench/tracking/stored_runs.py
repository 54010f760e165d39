"""The runs of a results folder in a tracker: find them, compare them with their journals, delete them."""

import math
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from moebench.tracking.address import default_uri, sqlite_path
from moebench.tracking.messages import collect_final_values, collect_unsent_values
from moebench.tracking.mlflow_store import MlflowStore, StoredRun
from moebench.tracking.source import RunSource, list_recorded_experiments, results_id

EXPERIMENT = "experiment"
"""In the tag `moebench.cell`: the parent run."""


def find_stored_runs(store: MlflowStore, results: Path) -> dict[str, StoredRun]:
    """Return the runs that this results folder has sent, by cell; `EXPERIMENT` for the parent run.

    Other folders may have sent the same cells to the same tracker. Runs without a mark are from an earlier version.
    """
    path, identity = sqlite_path(store.uri), results_id(results)
    # All runs of the database inside the results folder are its own, also if the file with the id was lost.
    is_own_database = path is not None and path.parent.resolve() == results.resolve()
    return {
        run.tags.get("moebench.cell", ""): run
        for run in store.runs()
        if is_own_database or run.tags.get("moebench.results", identity) == identity
    }


def was_trained_again(source: RunSource, run: StoredRun) -> bool:
    """Return whether the tracker has final values of an earlier training of a cell that is done."""
    if source.result is None:
        return False
    for value in collect_final_values(source.result, [], 0):
        stored = run.last_values.get(value.name)
        if stored is not None and not math.isclose(stored, value.value, rel_tol=1e-9):
            return True
    return False


@dataclass(frozen=True, kw_only=True)
class RunAudit:
    """Differences between the journal and result of a run, and what a tracker has of it."""

    cell_id: str
    experiment: str
    run_id: str
    """Id in the tracker; empty if it does not have the run."""
    doubled: tuple[tuple[str, int], ...]
    """(metric, step) that the tracker has more than once."""
    missing: tuple[tuple[str, int], ...]
    """(metric, step) that should have been sent and were not."""


def audit_runs(results: Path, uri: str | None = None) -> list[RunAudit]:
    """Compare all runs of a results folder with a tracker, by default the database in the folder; change nothing.

    Returns one entry for each run that differs. `moebench sync` sends what is missing. Raises TrackerError when the
    tracker cannot be used and UsageError for a damaged file.
    """
    uri = uri or default_uri(results)
    return [audit for store, name in _open_stores(results, uri) for audit in _audit_experiment(store, results, name)]


def delete_runs(results: Path, cell_ids: Collection[str], uri: str | None = None) -> int:
    """Move the runs of some cells to the trash of a tracker, from where MLflow can restore them; return their number.

    Raises TrackerError when the tracker cannot be used.
    """
    number = 0
    for store, _ in _open_stores(results, uri or default_uri(results)):
        stored = find_stored_runs(store, results)
        for cell_id in stored.keys() & set(cell_ids):
            store.delete(stored[cell_id].id)
            number += 1
    return number


def _open_stores(results: Path, uri: str) -> Iterator[tuple[MlflowStore, str]]:
    path = sqlite_path(uri)
    for name in list_recorded_experiments(results) if path is None or path.exists() else ():
        yield MlflowStore(uri, name, read_only=True), name


def _audit_experiment(store: MlflowStore, results: Path, name: str) -> Iterator[RunAudit]:
    stored = find_stored_runs(store, results)
    for cell in list_recorded_experiments(results)[name]["cells"]:
        source = RunSource.of(results, cell["id"])
        if not source.has_started:
            continue
        run, points = stored.get(source.id), source.read_final_points()
        expected, _ = collect_unsent_values(points, ())
        if source.result:
            expected += collect_final_values(source.result, points, 0)
        keys = {(value.name, value.step) for value in expected}
        if run is None and not keys:
            continue
        logged = store.list_logged(run.id, run.last_steps.keys()) if run else Counter()
        doubled = tuple(sorted(key for key, number in logged.items() if number > 1))
        missing = tuple(sorted(keys - logged.keys()))
        if doubled or missing:
            run_id = run.id if run else ""
            yield RunAudit(cell_id=source.id, experiment=name, run_id=run_id, doubled=doubled, missing=missing)
