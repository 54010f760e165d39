"""The SQLite database of a tracker: created once, checked before use, and moved together with its artifacts."""

import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import closing
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from moebench.tracking.address import connection_uri, sqlite_uri
from moebench.tracking.locks import hold_lock

_LOCK_TIMEOUT_S = 120
ARTIFACTS = "mlartifacts"
"""Folder of the artifacts, beside the database."""


def find_database_defect(path: Path) -> str | None:
    """Return why a database file cannot be used, None if it can be or does not exist yet."""
    if not path.exists():
        return None
    if not path.is_file():
        return "is not a plain file"
    if path.stat().st_size == 0:
        return None
    try:
        with path.open("rb") as file:
            if file.read(16) != b"SQLite format 3\x00":
                return "is not a SQLite database"
        with closing(_connect(path, "ro")) as connection:
            connection.execute("select count(*) from sqlite_master").fetchone()
    except (OSError, sqlite3.Error) as error:
        return f"cannot be read ({error})"
    return None if os.access(path, os.W_OK) else "cannot be written"


def find_database_damage(path: Path) -> str | None:
    """Return why a database cannot be used, after a check of all its pages; None if it can be or does not exist yet."""
    defect = find_database_defect(path)
    if defect or not path.exists() or path.stat().st_size == 0:
        return defect
    try:
        with closing(_connect(path, "ro")) as connection:
            (state,) = connection.execute("pragma quick_check(1)").fetchone()
            if not connection.execute("select 1 from sqlite_master where name = 'metrics'").fetchone():
                return "is not an MLflow database"
    except sqlite3.Error as error:
        return f"cannot be read ({error})"
    return None if state == "ok" else f"is damaged ({state})"


def read_points(path: Path, run_id: str) -> Counter[tuple[str, int]]:
    """Return how many values a run has of each metric at each step: MLflow would need a call for each metric."""
    with closing(_connect(path, "ro")) as connection:
        rows = connection.execute("select key, step from metrics where run_uuid = ?", (run_id,))
        return Counter((str(key), int(step)) for key, step in rows)


def read_experiments(path: Path) -> list[tuple[str, str, list[str]]]:
    """Return id, name and keys of the tags of each experiment that has runs, the one that was changed last first."""
    query = """
        select experiment_id, name from experiments where lifecycle_stage = 'active'
            and exists (select 1 from runs where runs.experiment_id = experiments.experiment_id)
        order by last_update_time desc, experiment_id desc
        """
    with closing(_connect(path, "ro")) as connection:
        tags: dict[str, list[str]] = {}
        for experiment, key in connection.execute("select experiment_id, key from experiment_tags"):
            tags.setdefault(str(experiment), []).append(str(key))
        rows = connection.execute(query).fetchall()
    return [(str(experiment), str(name), tags.get(str(experiment), [])) for experiment, name in rows]


def drop_duplicate_points(path: Path, run_ids: Collection[str]) -> None:
    """Leave the latest of several values that a run has of a metric at a step: a resumed run measured it again."""
    delete = """
        delete from metrics where run_uuid = :run and timestamp < (
            select max(timestamp) from metrics as later
            where later.run_uuid = :run and later.key = metrics.key and later.step = metrics.step)
        """
    with closing(_connect(path, "rw")) as connection:
        connection.executemany(delete, [{"run": run_id} for run_id in run_ids])
        connection.commit()


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=30)


def prepare_database(path: Path, on_wait: Callable[[], None]) -> str | None:
    """Create the database if there is none, and make its artifacts those beside it; return why it cannot be used.

    Concurrent migrations by several processes would corrupt a new database: they take turns. `on_wait` is called while
    another process has its turn.
    """
    from filelock import Timeout

    if not path.parent.is_dir():
        return "cannot be created: its folder does not exist"
    try:
        with hold_lock(Path(f"{path}.lock"), _LOCK_TIMEOUT_S, on_wait):
            reason = find_database_defect(path)
            if reason:
                return reason
            if not path.exists() or path.stat().st_size == 0:
                _create(path)
            else:
                relocate_artifacts(path)
    except Timeout:
        return f"is being created by another process for more than {_LOCK_TIMEOUT_S} s"
    return None


def relocate_artifacts(path: Path) -> None:
    """Make the artifacts of the experiments those beside the database, after its folder was moved or copied.

    MLflow stores absolute addresses. An experiment whose artifacts are elsewhere on purpose is left alone.
    """
    root = path.absolute().parent / ARTIFACTS
    with closing(sqlite3.connect(path, timeout=60, isolation_level=None)) as connection:
        if not connection.execute("select 1 from sqlite_master where name = 'experiments'").fetchone():
            return
        query = "select experiment_id, name, artifact_location from experiments"
        moves = {
            experiment: (location, (root / name).as_uri())
            for experiment, name, location in connection.execute(query)
            if _has_moved(str(location or ""), root, name)
        }
        if not moves:
            return
        connection.execute("begin immediate")
        for experiment, (old, new) in moves.items():
            connection.execute(
                "update experiments set artifact_location = ? where experiment_id = ?", (new, experiment)
            )
            connection.execute(
                "update runs set artifact_uri = ? || substr(artifact_uri, ?)"
                " where experiment_id = ? and substr(artifact_uri, 1, ?) = ?",
                (new, len(old) + 1, experiment, len(old) + 1, f"{old}/"),
            )
        connection.execute("commit")


def _has_moved(location: str, root: Path, name: str) -> bool:
    """Return whether the artifacts of an experiment were beside the database, in another folder than now."""
    if not location.endswith((f"/{ARTIFACTS}/{quote(name)}", f"/{ARTIFACTS}/{name}")):
        return False
    old = Path(unquote(urlsplit(location).path))
    # The database of a results folder never leaves it; another one may serve several folders.
    return old != root / name and ((root.parent / "runs").is_dir() or (root / name).is_dir() or not old.is_dir())


def _create(path: Path) -> None:
    from mlflow import MlflowClient

    # In another file, renamed afterwards: a process killed during the migrations leaves an unusable database.
    temporary = path.with_name(path.name + ".new")
    for leftover in (temporary, temporary.with_name(temporary.name + "-journal")):
        leftover.unlink(missing_ok=True)
    MlflowClient(connection_uri(sqlite_uri(temporary))).search_experiments(max_results=1)
    temporary.replace(path)
