"""MLflow as a place to send runs to: the only module that imports it, and only when it is used."""

import json
import logging
import os
import sqlite3
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from moebench.errors import UsageError

MAX_BATCH = 1000
_SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks")
_SQLITE = "sqlite:///"
# MLflow's pages show training runs first instead of traces of language model calls.
_KIND = {"mlflow.experimentKind": "custom_model_development"}
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    # The defaults wait 246 s for a dead server.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "8",
    # A connection per transaction leaves no file handle behind.
    "MLFLOW_SQLALCHEMYSTORE_POOLCLASS": "NullPool",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}


class TrackerError(Exception):
    """The tracker cannot be used now: one line with its address and what to do; journals are kept."""


@dataclass(frozen=True, kw_only=True)
class Value:
    """One number for one metric; ``time_ms`` is unix time in milliseconds."""

    name: str
    value: float
    time_ms: int
    step: int


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """A run as the tracker knows it: MLflow status, end (unix milliseconds, 0 = none), tags, parameters."""

    id: str
    status: str
    end_ms: int = 0
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)


def default_uri(results: Path) -> str:
    """Return the address of the SQLite database inside a results folder."""
    return f"{_SQLITE}{(results / 'mlflow.db').absolute()}"


def check_uri(uri: str) -> None:
    """Raise UsageError for an address of a kind that no tracker has."""
    scheme = urlsplit(uri).scheme.partition("+")[0]
    if scheme not in _SCHEMES:
        raise UsageError(
            f"--tracker {redact_credentials(uri)}: '{scheme}' is no kind of tracker; allowed: none, {', '.join(_SCHEMES)}"
        )


def sqlite_path(uri: str) -> Path | None:
    """Return the file behind a SQLite address, or None for a server."""
    return Path(uri[len(_SQLITE) :]) if uri.startswith(_SQLITE) else None


def shown(uri: str) -> str:
    """Return the address without user name and password, fit for files and messages."""
    parts = urlsplit(uri)
    return uri if "@" not in parts.netloc else parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def damage(path: Path) -> str | None:
    """Say in a few words why a database file cannot be used, or None when it can or does not exist yet."""
    if not path.exists() or path.stat().st_size == 0:
        return None
    try:
        with path.open("rb") as file:
            if file.read(16) != b"SQLite format 3\x00":
                return "is not a SQLite database"
        connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        try:
            connection.execute("select count(*) from sqlite_master").fetchone()
        finally:
            connection.close()
    except (OSError, sqlite3.Error) as error:
        return f"cannot be read ({error})"
    return None if os.access(path, os.W_OK) else "cannot be written"


@contextmanager
def quiet() -> Iterator[None]:
    """Keep telemetry, progress bars, log chatter and deprecations of MLflow's own code out of our output."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Its import sets the level of its own loggers.
        import mlflow  # noqa: F401

        for name in ("mlflow", "alembic", "sqlalchemy"):
            logging.getLogger(name).setLevel(logging.ERROR)
        yield


@contextmanager
def _reported(uri: str) -> Iterator[None]:
    # The edge of a foreign system: whatever goes wrong there must not reach training as anything else.
    try:
        with quiet_mlflow():
            yield
    except (TrackerError, UsageError):
        raise
    except Exception as error:
        # Some libraries quote the whole address, password included.
        reason = str(error).replace(urlsplit(uri).netloc or uri, urlsplit(redact_credentials(uri)).netloc or uri)
        reason = " ".join(reason.split())[:200] or type(error).__name__
        raise unavailable(uri, f"cannot be used ({reason})") from error


def unavailable(uri: str, reason: str) -> TrackerError:
    """Build the one line that says which tracker fails, why, and what to do."""
    path = sqlite_path(uri)
    place = f"tracker file {path}" if path else f"tracker {redact_credentials(uri)}"
    return TrackerError(f"{place} {reason}; nothing is lost: run `moebench sync` when it is repaired")


class MlflowStore:
    """One experiment in one MLflow tracker: a parent run, and a child run for each cell.

    A fresh SQLite database is created once, under a file lock, whatever number of processes open it.
    Artifacts of a SQLite tracker go under ``artifact_root``; a server decides itself. Every method raises
    TrackerError when the tracker cannot be used. A damaged file is reported and never touched.
    """

    def __init__(self, uri: str, artifact_root: Path, experiment: str) -> None:
        self.uri, self.experiment = uri, experiment
        with _reported(uri):
            self._client = _client(uri)
            self._id = _experiment_id(self._client, experiment, artifact_root if sqlite_path(uri) else None)

    def runs(self) -> list[StoredRun]:
        """Return every run of the experiment that is not deleted."""
        found: list[StoredRun] = []
        with _reported(self.uri):
            page = self._client.search_runs([self._id], max_results=1000)
            found += [_stored(run) for run in page]
            while page.token:
                page = self._client.search_runs([self._id], max_results=1000, page_token=page.token)
                found += [_stored(run) for run in page]
        return found

    def create(self, name: str, tags: Mapping[str, str], start_ms: int, parent: str = "") -> StoredRun:
        """Start a run; ``parent`` makes it a child."""
        family = {"mlflow.parentRunId": parent} if parent else {}
        with _reported(self.uri):
            return _stored(self._client.create_run(self._id, start_ms, {**tags, **family}, name))

    def log(
        self,
        run_id: str,
        values: Sequence[Value] = (),
        tags: Mapping[str, str] | None = None,
        params: Mapping[str, str] | None = None,
    ) -> None:
        """Send values (at most 1,000), tags and parameters in one call; the tags are written last."""
        from mlflow.entities import Metric, Param, RunTag

        metrics = [Metric(v.name, v.value, v.time_ms, v.step) for v in values]
        marks = [RunTag(key, value) for key, value in (tags or {}).items()]
        settings = [Param(key, value) for key, value in (params or {}).items()]
        with _reported(self.uri):
            self._client.log_batch(run_id, metrics, settings, marks)

    def sent(self, run_id: str, names: Collection[str]) -> set[tuple[str, int]]:
        """Return the metric and step of every value that a run has of these metrics."""
        with _reported(self.uri):
            return {(v.key, v.step) for name in names for v in self._client.get_metric_history(run_id, name)}

    def log_dataset(self, run_id: str, name: str, digest: str) -> None:
        """Say which data a run read; MLflow keeps 36 characters of the digest."""
        with _reported(self.uri):
            from mlflow.data.code_dataset_source import CodeDatasetSource
            from mlflow.data.meta_dataset import MetaDataset
            from mlflow.entities import Dataset, DatasetInput, InputTag

            source = CodeDatasetSource({"name": name, "digest": digest})
            entry = Dataset(**MetaDataset(source, name=name, digest=digest[:36]).to_dict())
            inputs = [DatasetInput(entry, [InputTag("mlflow.data.context", "training")])]
            self._client.log_inputs(run_id, inputs)

    def log_file(self, run_id: str, path: Path) -> None:
        """Send a file under its own name, replacing an earlier one."""
        with _reported(self.uri):
            self._client.log_artifact(run_id, str(path))

    def log_yaml(self, run_id: str, content: Mapping[str, Any], name: str) -> None:
        """Send a mapping as a YAML file, replacing an earlier one."""
        with _reported(self.uri):
            self._client.log_dict(run_id, dict(content), name)

    def log_table(self, run_id: str, table: Mapping[str, Sequence[Any]], name: str) -> None:
        """Send ``{"columns": [...], "data": [rows]}``, replacing an earlier table of this name."""
        with _reported(self.uri):
            # MLflow's own log_table appends to a table that exists: a second replay would double it.
            self._client.log_text(run_id, json.dumps(table), name)
            mark = json.dumps([{"path": name, "type": "table"}])
            self._client.set_tag(run_id, "mlflow.loggedArtifacts", mark)

    def set_status(self, run_id: str, status: str, end_ms: int | None = None) -> None:
        """Set RUNNING, FINISHED, FAILED or KILLED; the last three with the time of the end."""
        with _reported(self.uri):
            if status == "RUNNING":
                self._client.update_run(run_id, status="RUNNING")
            else:
                self._client.set_terminated(run_id, status, end_ms)


def _client(uri: str) -> Any:
    path = sqlite_path(uri)
    if path is None:
        from mlflow import MlflowClient

        return MlflowClient(uri)
    from filelock import FileLock

    if not path.parent.is_dir():
        raise unavailable(uri, "cannot be created: its folder does not exist")
    # Several processes that create the tables at once destroy each other's migration.
    with FileLock(f"{path}.lock", timeout=120):
        reason = damage(path)
        if reason:
            raise unavailable(uri, reason)
        if not path.exists() or path.stat().st_size == 0:
            _create(path)
        from mlflow import MlflowClient

        return MlflowClient(uri)


def _create(path: Path) -> None:
    from mlflow import MlflowClient

    # A process that is killed amid the migrations leaves tables that nobody can use: they are made aside.
    aside = path.with_name(path.name + ".new")
    for leftover in (aside, aside.with_name(aside.name + "-journal")):
        leftover.unlink(missing_ok=True)
    MlflowClient(f"{_SQLITE}{aside}").search_experiments(max_results=1)
    aside.replace(path)


def _experiment_id(client: Any, name: str, artifact_root: Path | None) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        place = (artifact_root.absolute() / name).as_uri() if artifact_root else None
        try:
            return str(client.create_experiment(name, artifact_location=place, tags=_KIND))
        except MlflowException as error:
            # Another process was faster.
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def _stored(run: Any) -> StoredRun:
    return StoredRun(
        id=run.info.run_id,
        status=run.info.status,
        end_ms=run.info.end_time or 0,
        tags=dict(run.data.tags),
        params=dict(run.data.params),
    )
