"""MLflow as the store of runs: experiments, runs and their values. MLflow is imported only when it is used."""

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moebench.errors import UsageError
from moebench.tracking.address import connection_uri, redact_text, redact_uri, sqlite_path
from moebench.tracking.bookkeeping import add_hidden_names
from moebench.tracking.database import ARTIFACTS, find_database_defect, prepare_database
from moebench.tracking.quiet import silence_mlflow

MAX_BATCH, MAX_BATCH_PARAMS = 1000, 100
"""Values, and parameters, that one call may send."""
# Some versions of MLflow's UI then show training runs first instead of traces of language model calls.
_KIND = {"mlflow.experimentKind": "custom_model_development"}
_PARENT = "mlflow.parentRunId"


class TrackerError(Exception):
    """The tracker cannot be used now: one line with its address and the reason. Journals are kept."""


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
    start_ms: int = 0
    """Unix time of the start."""
    end_ms: int = 0
    """Unix time of the end; 0: the run has not ended."""
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    last_steps: Mapping[str, int] = field(default_factory=dict)
    """Highest step that each metric has a value of."""
    last_values: Mapping[str, float] = field(default_factory=dict)
    """Value of each metric at this step."""

    @property
    def parent(self) -> str:
        """Id of the parent run, empty for none."""
        return self.tags.get(_PARENT, "")


@contextmanager
def _tracker_errors(uri: str) -> Iterator[None]:
    """Convert every exception of MLflow and its dependencies into TrackerError."""
    try:
        with silence_mlflow():
            yield
    except (TrackerError, UsageError):
        raise
    except Exception as error:
        reason = " ".join(redact_text(str(error), uri).split())[:200] or type(error).__name__
        raise build_tracker_error(uri, f"cannot be used ({reason})") from error


def build_tracker_error(uri: str, reason: str) -> TrackerError:
    """Build the error with the tracker's address and the reason."""
    path = sqlite_path(uri)
    tracker = f"tracker file {path}" if path else f"tracker {redact_uri(uri)}"
    return TrackerError(f"{tracker} {reason}")


class MlflowStore:
    """One experiment in one MLflow tracker: a parent run, and a child run for each cell.

    A new SQLite database is created under a file lock, so that several processes may open it at once. Its artifacts
    are stored beside it; a server has its own storage. Every method raises TrackerError when the tracker cannot be
    used. A damaged database is reported and never modified. `on_progress` is called after every call that the tracker
    has answered. With `read_only` nothing is created, and an experiment that the tracker does not have has no runs.
    """

    def __init__(
        self, uri: str, experiment: str, on_progress: Callable[[], None] = lambda: None, *, read_only: bool = False
    ) -> None:
        self.uri, self.experiment, self._on_progress = uri, experiment, on_progress
        path = sqlite_path(uri)
        with self._call():
            self._client = _client(uri, on_progress, read_only=read_only)
            if read_only:
                stored = self._client.get_experiment_by_name(experiment)
                self._id = str(stored.experiment_id) if stored else ""
            else:
                self._id = _experiment_id(self._client, experiment, path.parent / ARTIFACTS if path else None)

    def runs(self) -> list[StoredRun]:
        """Return all runs of the experiment that are not deleted."""
        runs: list[StoredRun] = []
        if not self._id:
            return runs
        with self._call():
            page = self._client.search_runs([self._id], max_results=1000)
            runs += [_stored_run(run) for run in page]
            while page.token:
                page = self._client.search_runs([self._id], max_results=1000, page_token=page.token)
                runs += [_stored_run(run) for run in page]
        return runs

    def create(self, name: str, tags: Mapping[str, str], start_ms: int, parent: str = "") -> StoredRun:
        """Create a run, as a child of the run `parent` if given."""
        parent_tag = {_PARENT: parent} if parent else {}
        with self._call():
            return _stored_run(self._client.create_run(self._id, start_ms, {**tags, **parent_tag}, name))

    def log(
        self,
        run_id: str,
        values: Sequence[MetricValue] = (),
        tags: Mapping[str, str] | None = None,
        params: Mapping[str, str] | None = None,
    ) -> None:
        """Send at most `MAX_BATCH` values, tags and parameters in one call, further parameters before it in others.

        The tags are written last.
        """
        from mlflow.entities import Metric, Param, RunTag

        metrics = [Metric(v.name, v.value, v.time_ms, v.step) for v in values]
        run_tags = [RunTag(key, value) for key, value in (tags or {}).items()]
        run_params = [Param(key, value) for key, value in (params or {}).items()]
        while len(run_params) > MAX_BATCH_PARAMS:
            with self._call():
                self._client.log_batch(run_id, params=run_params[:MAX_BATCH_PARAMS])
            run_params = run_params[MAX_BATCH_PARAMS:]
        with self._call():
            self._client.log_batch(run_id, metrics, run_params, run_tags)

    def read_experiment_tags(self) -> dict[str, str]:
        """Return the tags of the experiment."""
        with self._call():
            return dict(self._client.get_experiment(self._id).tags)

    def set_experiment_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the experiment."""
        for key, value in tags.items():
            with self._call():
                self._client.set_experiment_tag(self._id, key, value)

    def list_logged(self, run_id: str, names: Collection[str]) -> Counter[tuple[str, int]]:
        """Return how many values a run has of each of the given metrics at each step, by (name, step)."""
        logged: Counter[tuple[str, int]] = Counter()
        for name in names:
            with self._call():
                logged.update((name, value.step) for value in self._client.get_metric_history(run_id, name))
        return logged

    def set_parent(self, run_id: str, parent: str) -> None:
        """Make a run a child of the run `parent`."""
        with self._call():
            self._client.set_tag(run_id, _PARENT, parent)

    def delete(self, run_id: str) -> None:
        """Move a run to MLflow's trash, from where it can be restored."""
        with self._call():
            self._client.delete_run(run_id)

    def log_dataset(self, run_id: str, name: str, digest: str, split: str) -> None:
        """Record data of a run, such as that of the split `training`; MLflow stores 36 characters of the digest."""
        with self._call():
            from mlflow.data.code_dataset_source import CodeDatasetSource
            from mlflow.data.meta_dataset import MetaDataset
            from mlflow.entities import Dataset, DatasetInput, InputTag

            source = CodeDatasetSource({"name": name, "digest": digest})
            entry = Dataset(**MetaDataset(source, name=name, digest=digest[:36]).to_dict())
            inputs = [DatasetInput(entry, [InputTag("mlflow.data.context", split)])]
            self._client.log_inputs(run_id, inputs)

    def log_file(self, run_id: str, path: Path) -> None:
        """Send a file under its own name, replacing an earlier version."""
        with self._call():
            self._client.log_artifact(run_id, str(path))

    def log_yaml(self, run_id: str, content: Mapping[str, Any], name: str) -> None:
        """Send a mapping as a YAML file, replacing an earlier version."""
        with self._call():
            self._client.log_dict(run_id, dict(content), name)

    def log_tables(self, run_id: str, tables: Mapping[str, Mapping[str, Sequence[Any]]]) -> None:
        """Send all tables of a run by file name, with the keys `columns` and `data` (rows), replacing earlier ones."""
        # MLflow's log_table appends to an existing table: a second replay would duplicate its rows.
        for name, table in tables.items():
            with self._call():
                self._client.log_text(run_id, json.dumps(table), name)
        # The UI shows a JSON file that is named here as a table.
        artifacts = json.dumps([{"path": name, "type": "table"} for name in tables])
        with self._call():
            self._client.set_tag(run_id, "mlflow.loggedArtifacts", artifacts)

    def set_status(self, run_id: str, status: str, end_ms: int | None = None) -> None:
        """Set the status to RUNNING, or to FINISHED, FAILED or KILLED with the time of the end."""
        with self._call():
            if status == "RUNNING":
                self._client.update_run(run_id, status="RUNNING")
            else:
                self._client.set_terminated(run_id, status, end_ms)

    @contextmanager
    def _call(self) -> Iterator[None]:
        with _tracker_errors(self.uri):
            yield
        self._on_progress()


def _client(uri: str, on_progress: Callable[[], None], *, read_only: bool) -> Any:
    from mlflow import MlflowClient

    path = sqlite_path(uri)
    reason = None
    if path:
        reason = find_database_defect(path) if read_only else prepare_database(path, on_progress)
    if reason:
        raise build_tracker_error(uri, reason)
    return MlflowClient(connection_uri(uri))


def _experiment_id(client: Any, name: str, artifact_root: Path | None) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        location = (artifact_root / name).absolute().as_uri() if artifact_root else None
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
    values = run.data.to_proto().metrics  # RunData.metrics has no steps
    return StoredRun(
        id=run.info.run_id,
        status=run.info.status,
        start_ms=run.info.start_time or 0,
        end_ms=run.info.end_time or 0,
        tags=add_hidden_names(run.data.tags),
        params=dict(run.data.params),
        last_steps={value.key: int(value.step) for value in values},
        last_values={value.key: float(value.value) for value in values},
    )
