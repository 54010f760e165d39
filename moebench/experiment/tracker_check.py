"""Compare the tracker of a results folder, if it is a SQLite database, with the journals that it was sent."""

import contextlib
import math
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from moebench.errors import UsageError
from moebench.experiment.verification import Finding
from moebench.runs.folder import RunFolder
from moebench.runs.journal import read_journal
from moebench.tracking.address import default_uri, sqlite_path
from moebench.tracking.database import find_database_defect
from moebench.tracking.mlflow_store import TrackerError
from moebench.tracking.quiet import silence_mlflow
from moebench.tracking.replay import replay
from moebench.tracking.source import list_recorded_experiments

DOUBLED = "select run_uuid, key, step, max(timestamp) from metrics group by run_uuid, key, step having count(*) > 1"
RUNS = """
select runs.run_uuid, runs.status, experiments.name, tags.value from runs
join experiments on experiments.experiment_id = runs.experiment_id
join tags on tags.run_uuid = runs.run_uuid and tags.key = 'moebench.cell'
where runs.lifecycle_stage = 'active'
"""


def check_tracker(results: Path, uri: str | None = None) -> Iterator[Finding]:
    """Yield what the tracker lacks, has twice or shows as running although it is not."""
    path = sqlite_path(uri or default_uri(results))
    if path is None:
        yield Finding(where="tracker", problem="is a server: not checked", remedy="`moebench sync`", is_note=True)
        return
    if not path.exists() or path.stat().st_size == 0:  # nothing was sent yet
        return
    try:
        defect = find_database_defect(path)
        if defect:
            yield Finding(where=str(path), problem=defect, remedy="move it away; `moebench sync` fills a new one")
            return
        with contextlib.closing(_connect(path, "ro")) as connection:
            (state,) = connection.execute("pragma quick_check(1)").fetchone()
            if state != "ok":
                remedy = "move it away; `moebench sync` fills a new one"
                yield Finding(where=str(path), problem=f"is damaged ({state})", remedy=remedy)
                return
            yield from _check_runs(connection, results, path, uri or default_uri(results))
    except sqlite3.Error as error:
        yield Finding(where=str(path), problem=f"cannot be checked ({error})", remedy="is it an MLflow database?")


def _check_runs(connection: sqlite3.Connection, results: Path, path: Path, uri: str) -> Iterator[Finding]:
    doubled = connection.execute(DOUBLED).fetchall()
    if doubled:
        yield Finding(
            where=str(path),
            problem=f"{len(doubled)} points are there twice or more",
            remedy="the earlier ones dropped",
            fix=lambda: _drop_doubled(results, path),
        )
    stored = {(name, cell): (run_id, status) for run_id, status, name, cell in connection.execute(RUNS)}
    num_missing = 0
    stale: dict[str, str] = {}
    for name, experiment in list_recorded_experiments(results).items():
        folders = [RunFolder.of(results, cell["id"]) for cell in experiment["cells"]]
        for folder in folders:
            if not folder.path.is_dir() or is_being_trained(folder):
                continue
            run_id, status = stored.get((name, folder.path.name), (None, ""))
            num_missing += len(_list_sendable(folder) - _list_stored(connection, run_id))
            if run_id and status == "RUNNING":
                stale[run_id] = _find_end_status(folder)
        run_id, status = stored.get((name, "experiment"), (None, ""))
        if run_id and status == "RUNNING" and not any(map(is_being_trained, folders)):
            stale[run_id] = "KILLED"
    remedy = "sent, as by `moebench sync`"
    if num_missing:
        problem = f"{num_missing} points of the journals are missing"
        yield Finding(where=str(path), problem=problem, remedy=remedy, fix=lambda: _sync(results, uri))
    if stale:
        problem = f"{len(stale)} runs are shown as running and are not"
        yield Finding(where=str(path), problem=problem, remedy="closed", fix=lambda: _close(uri, stale))


def _find_end_status(folder: RunFolder) -> str:
    """Return the status that the tracker should show for a run that is not being trained."""
    try:
        result = folder.read_result()
    except UsageError:
        return "FAILED"
    return {"done": "FINISHED", "failed": "FAILED"}.get(result.status, "KILLED") if result else "KILLED"


def _list_sendable(folder: RunFolder) -> set[tuple[str, int]]:
    """Return metric and step of each point that a tracker should have; none where the run itself is damaged."""
    try:
        points, _ = read_journal(folder.journal)
        last_step = math.inf if folder.read_result() else folder.checkpointed_step
    except UsageError:
        return set()
    return {
        (name, point.step)
        for point in points
        for name, value in point.metrics.items()
        if point.step <= last_step and math.isfinite(value)
    }


def _list_stored(connection: sqlite3.Connection, run_id: str | None) -> set[tuple[str, int]]:
    rows = connection.execute("select key, step from metrics where run_uuid = ?", (run_id,))
    return {(str(key), int(step)) for key, step in rows}


def is_being_trained(folder: RunFolder) -> bool:
    """Return whether a process holds the lock of a run."""
    if not folder.lock.exists():
        return False
    try:
        with FileLock(folder.lock, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        return False


def _drop_doubled(results: Path, path: Path) -> None:
    # The latest of them is the one that the journal has: a run that was resumed measured the step again.
    delete = "delete from metrics where run_uuid = ? and key = ? and step = ? and timestamp < ?"
    with FileLock(results / ".tracking.lock", timeout=60), contextlib.closing(_connect(path, "rw")) as connection:
        connection.executemany(delete, connection.execute(DOUBLED).fetchall())
        connection.commit()


def _close(uri: str, statuses: dict[str, str]) -> None:
    """Set the status of runs that have ended: id in the tracker -> status."""
    with silence_mlflow():
        from mlflow import MlflowClient

        client = MlflowClient(uri)
        for run_id, status in statuses.items():
            client.set_terminated(run_id, status)


def _sync(results: Path, uri: str) -> None:
    try:
        replay(results, uri)
    except TrackerError as error:
        raise UsageError(str(error)) from error


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=30)
