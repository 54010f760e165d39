"""MLflow as the store of runs: the only module that imports it, and only when it is used."""

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
"""Values that one call may send."""
_SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks")
_SQLITE = "sqlite:///"
# Makes MLflow's UI show training runs first instead of traces of language model calls.
_KIND = {"mlflow.experimentKind": "custom_model_development"}
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    # The defaults wait 246 s for a server that does not respond.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "8",
    # One connection per transaction, so that no file stays open.
    "MLFLOW_SQLALCHEMYSTORE_POOLCLASS": "NullPool",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}


class TrackerError(Exception):
    """The tracker cannot be used now: one line with its address and the remedy. Journals are kept."""


@dataclass(frozen=True, kw_only=True)
class MetricValue:
    """One value of a metric at one step."""

    name: str
    value: float
    time_ms: int
    """Unix time."""
    step: int


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """A run as stored in the tracker."""

    id: str
    status: str
    """MLflow's status: RUNNING, FINISHED, FAILED or KILLED."""
    end_ms: int = 0
    """Unix time of the end; 0: the run has not ended."""
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)


def default_uri(results: Path) -> str:
    """Return the address of the SQLite database inside a results folder."""
    return f"{_SQLITE}{(results / 'mlflow.db').absolute()}"


def check_uri(uri: str) -> None:
    """Raise UsageError for an address with a scheme that no tracker has."""
    scheme = urlsplit(uri).scheme.partition("+")[0]
    if scheme not in _SCHEMES:
        raise UsageError(
            f"--tracker {redact_credentials(uri)}: '{scheme}' is no kind of tracker;"
            f" allowed: none, {', '.join(_SCHEMES)}"
        )


def sqlite_path(uri: str) -> Path | None:
    """Return the file of a SQLite address, None for a server."""
    return Path(uri[len(_SQLITE) :]) if uri.startswith(_SQLITE) else None


def redact_credentials(uri: str) -> str:
    """Return the address without user name and password, for files and messages."""
    parts = urlsplit(uri)
    return uri if "@" not in parts.netloc else parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def find_database_defect(path: Path) -> str | None:
    """Return why a database file cannot be used, None if it can be or does not exist yet."""
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
def silence_mlflow() -> Iterator[None]:
    """Suppress MLflow's telemetry, progress bars, log messages and deprecation warnings."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Importing MLflow sets the level of its loggers.
        import mlflow  # noqa: F401

        for name in ("mlflow", "alembic", "sqlalchemy"):
            logging.getLogger(name).setLevel(logging.ERROR)
        yield


@contextmanager
def _tracker_errors(uri: str) -> Iterator[None]:
    """Convert every exception of MLflow and its dependencies into TrackerError."""
    try:
        with silence_mlflow():
            yield
    except (TrackerError, UsageError):
        raise
    except Exception as error:
        # Some libraries quote the full address, with its password.
        reason = str(error).replace(urlsplit(uri).netloc or uri, urlsplit(redact_credentials(uri)).netloc or uri)
        reason = " ".join(reason.split())[:200] or type(error).__name__
        raise build_tracker_error(uri, f"cannot be used ({reason})") from error


def build_tracker_error(uri: str, reason: str) -> TrackerError:
    """Build the error with the tracker's address, the reason and the remedy."""
    path = sqlite_path(uri)
    tracker = f"tracker file {path}" if path else f"tracker {redact_credentials(uri)}"
    return TrackerError(f"{tracker} {reason}; nothing is lost: run `moebench sync` when it is repaired")


class MlflowStore:
    """One experiment in one MLflow tracker: a parent run, and a child run for each cell.

    A new SQLite database is created under a file lock, so that several processes may open it at once. Artifacts of a
    SQLite tracker are stored under `artifact_root`; a server has its own storage. Every method raises TrackerError when
    the tracker cannot be used. A damaged database is reported and never modified.
    """

    def __init__(self, uri: str, artifact_root: Path, experiment: str) -> None:
        self.uri, self.experiment = uri, experiment
        with _tracker_errors(uri):
            self._client = _client(uri)
            self._id = _experiment_id(self._client, experiment, artifact_root if sqlite_path(uri) else None)

    def runs(self) -> list[StoredRun]:
        """Return all runs of the experiment that are not deleted."""
        runs: list[StoredRun] = []
        with _tracker_errors(self.uri):
            page = self._client.search_runs([self._id], max_results=1000)
            runs += [_stored_run(run) for run in page]
            while page.token:
                page = self._client.search_runs([self._id], max_results=1000, page_token=page.token)
                runs += [_stored_run(run) for run in page]
        return runs

    def create(self, name: str, tags: Mapping[str, str], start_ms: int, parent: str = "") -> StoredRun:
        """Create a run, as a child of the run `parent` if given."""
        parent_tag = {"mlflow.parentRunId": parent} if parent else {}
        with _tracker_errors(self.uri):
            return _stored_run(self._client.create_run(self._id, start_ms, {**tags, **parent_tag}, name))

    def log(
        self,
        run_id: str,
        values: Sequence[MetricValue] = (),
        tags: Mapping[str, str] | None = None,
        params: Mapping[str, str] | None = None,
    ) -> None:
        """Send at most `MAX_BATCH` values, tags and parameters in one call; the tags are written last."""
        from mlflow.entities import Metric, Param, RunTag

        metrics = [Metric(v.name, v.value, v.time_ms, v.step) for v in values]
        run_tags = [RunTag(key, value) for key, value in (tags or {}).items()]
        run_params = [Param(key, value) for key, value in (params or {}).items()]
        with _tracker_errors(self.uri):
            self._client.log_batch(run_id, metrics, run_params, run_tags)

    def list_logged(self, run_id: str, names: Collection[str]) -> set[tuple[str, int]]:
        """Return the name and step of every value that a run has of the given metrics."""
        with _tracker_errors(self.uri):
            return {(v.key, v.step) for name in names for v in self._client.get_metric_history(run_id, name)}

    def log_dataset(self, run_id: str, name: str, digest: str) -> None:
        """Record the data of a run; MLflow stores 36 characters of the digest."""
        with _tracker_errors(self.uri):
            from mlflow.data.code_dataset_source import CodeDatasetSource
            from mlflow.data.meta_dataset import MetaDataset
            from mlflow.entities import Dataset, DatasetInput, InputTag

            source = CodeDatasetSource({"name": name, "digest": digest})
            entry = Dataset(**MetaDataset(source, name=name, digest=digest[:36]).to_dict())
            inputs = [DatasetInput(entry, [InputTag("mlflow.data.context", "training")])]
            self._client.log_inputs(run_id, inputs)

    def log_file(self, run_id: str, path: Path) -> None:
        """Send a file under its own name, replacing an earlier version."""
        with _tracker_errors(self.uri):
            self._client.log_artifact(run_id, str(path))

    def log_yaml(self, run_id: str, content: Mapping[str, Any], name: str) -> None:
        """Send a mapping as a YAML file, replacing an earlier version."""
        with _tracker_errors(self.uri):
            self._client.log_dict(run_id, dict(content), name)

    def log_table(self, run_id: str, table: Mapping[str, Sequence[Any]], name: str) -> None:
        """Send a table with the keys `columns` and `data` (rows), replacing an earlier one of this name."""
        with _tracker_errors(self.uri):
            # MLflow's log_table appends to an existing table: a second replay would duplicate its rows.
            self._client.log_text(run_id, json.dumps(table), name)
            artifacts = json.dumps([{"path": name, "type": "table"}])
            self._client.set_tag(run_id, "mlflow.loggedArtifacts", artifacts)

    def set_status(self, run_id: str, status: str, end_ms: int | None = None) -> None:
        """Set the status to RUNNING, or to FINISHED, FAILED or KILLED with the time of the end."""
        with _tracker_errors(self.uri):
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
        raise build_tracker_error(uri, "cannot be created: its folder does not exist")
    # Concurrent migrations by several processes would corrupt the new database.
    with FileLock(f"{path}.lock", timeout=120):
        reason = find_database_defect(path)
        if reason:
            raise build_tracker_error(uri, reason)
        if not path.exists() or path.stat().st_size == 0:
            _create(path)
        from mlflow import MlflowClient

        return MlflowClient(uri)


def _create(path: Path) -> None:
    from mlflow import MlflowClient

    # In another file, renamed afterwards: a process killed during the migrations leaves an unusable database.
    temporary = path.with_name(path.name + ".new")
    for leftover in (temporary, temporary.with_name(temporary.name + "-journal")):
        leftover.unlink(missing_ok=True)
    MlflowClient(f"{_SQLITE}{temporary}").search_experiments(max_results=1)
    temporary.replace(path)


def _experiment_id(client: Any, name: str, artifact_root: Path | None) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        location = (artifact_root.absolute() / name).as_uri() if artifact_root else None
        try:
            return str(client.create_experiment(name, artifact_location=location, tags=_KIND))
        except MlflowException as error:
            # Another process has created it in the meantime.
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
    return str(experiment.experiment_id)


def _stored_run(run: Any) -> StoredRun:
    return StoredRun(
        id=run.info.run_id,
        status=run.info.status,
        end_ms=run.info.end_time or 0,
        tags=dict(run.data.tags),
        params=dict(run.data.params),
    )
