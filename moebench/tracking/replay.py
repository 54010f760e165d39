"""Replay: send what run folders hold and a tracker lacks. Repeatable after any crash; each point is sent once."""

import json
import platform
import time
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moebench.errors import UsageError, unknown
from moebench.runs.folder import read_json, write_json
from moebench.runs.journal import Point, read_journal
from moebench.tracking.messages import (
    collect_final_values,
    collect_unsent_values,
    send_load_table,
    split_into_batches,
)
from moebench.tracking.mlflow_store import (
    MAX_BATCH,
    MetricValue,
    MlflowStore,
    StoredRun,
    TrackerError,
    redact_credentials,
)
from moebench.tracking.source import RunSource, list_recorded_experiments

_STATUS = {"done": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


@dataclass(frozen=True, kw_only=True)
class ReplayReport:
    """What a replay did."""

    experiments: int = 0
    runs: int = 0
    """Number of runs seen."""
    values: int = 0
    """Number of values sent."""
    non_finite: int = 0
    """Number of values left out because they are not finite."""
    problems: tuple[str, ...] = ()
    """One line for each run whose files are damaged; the other runs were sent."""

    def __add__(self, other: "ReplayReport") -> "ReplayReport":
        return ReplayReport(
            experiments=self.experiments + other.experiments,
            runs=self.runs + other.runs,
            values=self.values + other.values,
            non_finite=self.non_finite + other.non_finite,
            problems=self.problems + other.problems,
        )


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """How far a journal was sent."""

    offset: int = 0
    """Bytes sent."""
    step: int = -1
    """Step of the last point sent."""
    tail: int = 0
    """Checksum of the bytes before `offset`."""


def replay(results: Path, uri: str, experiment_name: str | None = None, live: bool = False) -> ReplayReport:
    """Send everything that the tracker does not have yet, of one experiment or of all.

    Each batch carries the cursor of its run as a tag, and sending a batch twice writes the same rows, so nothing is
    duplicated. The points of a run without a result are sent up to its last checkpoint, since a crash would repeat
    later ones. With `live` such runs are still running, otherwise they are marked KILLED. Raises TrackerError when the
    tracker cannot be used and UsageError for an unknown experiment.
    """
    from filelock import FileLock, Timeout

    experiments = list_recorded_experiments(results)
    if experiment_name is not None and experiment_name not in experiments:
        raise unknown("experiment", experiment_name, experiments)
    report = ReplayReport()
    try:
        with FileLock(results / ".tracking.lock", timeout=60):
            for name in [experiment_name] if experiment_name is not None else sorted(experiments):
                report += _Sender(results, uri, name, live).send(experiments[name])
    except Timeout as error:
        raise TrackerError(f"{results}: another `moebench` is sending to a tracker; try later") from error
    except OSError as error:
        raise TrackerError(f"{results} cannot be written ({error}); run `moebench sync` later") from error
    return report


def fingerprint_sources(results: Path, experiment_name: str | None = None) -> tuple[tuple[str, int, int], ...]:
    """Return a value that changes when there may be something new to send, without contacting the tracker."""
    fingerprints = []
    for name, experiment in list_recorded_experiments(results).items():
        for cell in experiment["cells"] if experiment_name in (None, name) else ():
            source = RunSource.of(results, cell["id"])
            if source.has_started:
                times_ns = [path.stat().st_mtime_ns for path in source.attachments]
                fingerprints.append((cell["id"], source.folder.checkpointed_step, max(times_ns, default=0)))
    return tuple(fingerprints)


class _Sender:
    """Sends one experiment to one tracker."""

    def __init__(self, results: Path, uri: str, name: str, live: bool) -> None:
        self.results, self.uri, self.name, self.live = results, uri, name, live
        self.store = MlflowStore(uri, results / "mlartifacts", name)
        self.stored = {run.tags.get("moebench.cell", ""): run for run in self.store.runs()}
        self.stored_ids = {run.id for run in self.stored.values()}

    def send(self, experiment: Mapping[str, Any]) -> ReplayReport:
        """Send the runs of the experiment's cells, then the state of the experiment."""
        parent = self._find_or_create_parent(experiment)
        report, statuses = ReplayReport(experiments=1), []
        for cell in experiment["cells"]:
            source = RunSource.of(self.results, cell["id"])
            if not source.has_started:
                continue
            try:
                run_report, status = self._send_run(source, parent)
            except UsageError as error:
                run_report, status = ReplayReport(runs=1, problems=(str(error),)), "FAILED"
            report += run_report
            statuses.append(status)
        self._update_parent(parent, experiment, statuses)
        return report

    def _find_or_create_parent(self, experiment: Mapping[str, Any]) -> StoredRun:
        if "experiment" in self.stored:
            return self.stored["experiment"]
        keys = ("question", "file", "baseline")
        tags = {f"moebench.{key}": str(experiment[key]) for key in keys if experiment.get(key)}
        tags |= {"moebench.cell": "experiment", "mlflow.note.content": str(experiment.get("question") or "")}
        return self.store.create(self.name, tags, int(1000 * float(experiment.get("time") or time.time())))

    def _update_parent(self, parent: StoredRun, experiment: Mapping[str, Any], statuses: list[str]) -> None:
        figures = sorted((self.results / "experiments" / self.name).glob("*.png"))
        checksum = f"{zlib.crc32(b''.join(path.read_bytes() for path in figures)):08x}"
        for path in figures if parent.tags.get("moebench.figures") != checksum else ():
            self.store.log_file(parent.id, path)
        num_cells = len(experiment["cells"])
        if len(statuses) == num_cells:
            status = next((s for s in ("RUNNING", "FAILED", "KILLED") if s in statuses), "FINISHED")
        else:
            status = "RUNNING" if self.live else "KILLED"
        num_done = f"{statuses.count('FINISHED')} of {num_cells} done"
        self.store.log(parent.id, tags={"moebench.status": num_done, "moebench.figures": checksum})
        if status != parent.status:
            self.store.set_status(parent.id, status)

    def _send_run(self, source: RunSource, parent: StoredRun) -> tuple[ReplayReport, str]:
        """Send one run; return what was sent, and the run's status in the tracker."""
        run = self.stored.get(source.id) or self._create(source, parent)
        report = ReplayReport(runs=1)
        cursor = Cursor(**json.loads(run.tags.get("moebench.cursor", "{}")))
        points, sent = self._read_unsent(source, run, cursor)
        for batch in split_into_batches(points):
            end = batch[-1].end
            cursor = Cursor(offset=end, step=batch[-1].step, tail=_tail_checksum(source.folder.journal, end))
            values, non_finite = collect_unsent_values(batch, sent)
            tags = {"moebench.cursor": json.dumps(asdict(cursor))}
            if non_finite and not report.non_finite and "moebench.non_finite" not in run.tags:
                tags["moebench.non_finite"] = f"first: {non_finite[0].name} at step {non_finite[0].step}"
            self._log(run.id, values, tags)
            report += ReplayReport(values=len(values), non_finite=len(non_finite))
            self._record_cursor(source, run.id, cursor)
        return report, self._update_run(source, run, cursor)

    def _read_unsent(
        self, source: RunSource, run: StoredRun, cursor: Cursor
    ) -> tuple[list[Point], set[tuple[str, int]]]:
        """Return the points after the cursor, and the (metric, step) of values among them that the tracker has."""
        is_valid = _tail_checksum(source.folder.journal, cursor.offset) == cursor.tail
        points, _ = read_journal(source.folder.journal, cursor.offset if is_valid else 0)
        if source.result is None:
            last_step = source.folder.checkpointed_step
            points = [point for point in points if point.step <= last_step]
        if points and run.id in self.stored_ids and not (is_valid and cursor.offset):
            # The journal was truncated before the cursor (by a resume from an older checkpoint), or the cursor was
            # lost: only the tracker knows what it has.
            return points, self.store.list_logged(run.id, {name for point in points for name in point.metrics})
        return points, set()

    def _log(self, run_id: str, values: list[MetricValue], tags: Mapping[str, str]) -> None:
        # Of a step with more metrics than one call takes, the last call carries the cursor.
        while len(values) > MAX_BATCH:
            self.store.log(run_id, values[:MAX_BATCH])
            values = values[MAX_BATCH:]
        self.store.log(run_id, values, tags)

    def _create(self, source: RunSource, parent: StoredRun) -> StoredRun:
        path = source.folder.environment
        cell, environment = source.cell, read_json(path) if path.exists() else {}
        tags = {
            "moebench.cell": source.id,
            "moebench.arm": cell["arm"],
            "moebench.seed": cell["seed"],
            "moebench.git_commit": environment.get("git_commit"),
            "moebench.git_dirty": environment.get("git_dirty"),
            "moebench.host": environment.get("host", platform.node()),
            "moebench.data_digest": cell["data"]["digest"],
            "moebench.status": "running",
        }
        start_ms = int(1000 * source.folder.cell.stat().st_mtime)
        known_tags = {key: str(value) for key, value in tags.items() if value is not None}
        return self.store.create(f"{cell['arm']} seed {cell['seed']}", known_tags, start_ms, parent.id)

    def _update_run(self, source: RunSource, run: StoredRun, cursor: Cursor) -> str:
        """Describe a new run, send the result of a finished one, and return the run's status in the tracker."""
        if run.tags.get("moebench.described") is None:
            self._describe(source, run)
        if source.result is None:
            return self._update_unfinished(source, run)
        status = _STATUS.get(source.result.status, "FAILED")
        if run.tags.get("moebench.sent") != source.digest:
            for path in source.attachments:
                self.store.log_file(run.id, path)
            send_load_table(self.store, run.id, source.folder.loads)
            end_ms = int(1000 * _last_time_s(source))
            error = {"moebench.error": source.result.error} if source.result.error else {}
            tags = {"moebench.status": source.result.status, "moebench.sent": source.digest, **error}
            self.store.set_status(run.id, status, end_ms)
            self.store.log(run.id, collect_final_values(source.result, end_ms), tags)
            self._record_cursor(source, run.id, cursor, is_finished=True)
        return status

    def _describe(self, source: RunSource, run: StoredRun) -> None:
        cell = source.cell
        varies = {str(key): str(value) for key, value in cell.get("varies", {}).items()}
        self.store.log(run.id, params={k: v for k, v in varies.items() if k not in run.params})
        self.store.log_dataset(run.id, str(cell["data"]["name"]), str(cell["data"]["digest"]))
        self.store.log_yaml(run.id, cell["config"], "config.yaml")
        self.store.log(run.id, tags={"moebench.described": "yes"})

    def _update_unfinished(self, source: RunSource, run: StoredRun) -> str:
        changed_ms = source.folder.journal.stat().st_mtime * 1000 if source.folder.journal.exists() else 0
        # A run that was stopped earlier is running again as soon as its journal grows.
        is_running = self.live and (run.status == "RUNNING" or changed_ms > run.end_ms)
        status = "RUNNING" if is_running else "KILLED"
        if status != run.status:
            self.store.set_status(run.id, status)
            self.store.log(run.id, tags={"moebench.status": "running" if is_running else "stopped"})
        return status

    def _record_cursor(self, source: RunSource, run_id: str, cursor: Cursor, is_finished: bool = False) -> None:
        """Write what was sent to the run folder, where it can be read without contacting the tracker."""
        path = source.folder.path / "tracking.json"
        try:
            entries = read_json(path) if path.exists() else {}
        except UsageError:
            entries = {}
        progress = {"next_offset": cursor.offset, "last_step": cursor.step, "finished": is_finished}
        entries.setdefault(redact_credentials(self.uri), {})[self.name] = {"run_id": run_id, **progress}
        write_json(path, entries)


def _tail_checksum(path: Path, offset: int) -> int:
    """Return the CRC-32 of the last bytes before `offset`, at most 4096; 0 for a missing file or offset 0."""
    if offset == 0 or not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, offset - 4096))
        return zlib.crc32(file.read(min(offset, 4096)))


def _last_time_s(source: RunSource) -> float:
    """Return the unix time of the last point of a run, or of its result if it has none."""
    points, _ = read_journal(source.folder.journal)
    return points[-1].time if points else source.folder.result.stat().st_mtime
