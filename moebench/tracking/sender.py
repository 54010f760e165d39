"""Send one experiment to one tracker: its runs, each from where it was sent to, and its state."""

import json
import platform
import time
import zlib
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moebench.errors import UsageError
from moebench.file_access import read_plain_file
from moebench.runs.folder import read_json
from moebench.runs.journal import Point
from moebench.tracking.cursor import Cursor, compute_tail_checksum, record_cursor
from moebench.tracking.messages import (
    build_tables,
    collect_final_values,
    collect_unsent_values,
    describe_tuning,
    split_into_batches,
)
from moebench.tracking.metric_limit import describe_left_out, select_names
from moebench.tracking.mlflow_store import MAX_BATCH, MetricValue, MlflowStore, StoredRun
from moebench.tracking.report import ReplayReport
from moebench.tracking.source import RunSource, results_id
from moebench.tracking.stored_runs import EXPERIMENT, STATUSES, find_stored_runs, was_trained_again
from moebench.tracking.trivial_baselines import send_trivial_baselines


class Sender:
    """Sends one experiment of a results folder; with `live`, runs without a result are still running."""

    def __init__(self, results: Path, store: MlflowStore, *, live: bool) -> None:
        self.results, self.store, self.live = results, store, live
        self.stored = find_stored_runs(store, results)

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
        if EXPERIMENT in self.stored:
            return self.stored[EXPERIMENT]
        keys = ("question", "file", "baseline", "tuning_of")
        tags = {f"moebench.{key}": str(experiment[key]) for key in keys if experiment.get(key)}
        tags |= {"moebench.cell": EXPERIMENT, "moebench.results": results_id(self.results)}
        tags |= {"mlflow.note.content": str(experiment.get("question") or "")}
        start_ms = int(1000 * float(experiment.get("time") or time.time()))
        return self.store.create(self.store.experiment, tags, start_ms)

    def _update_parent(self, parent: StoredRun, experiment: Mapping[str, Any], statuses: list[str]) -> None:
        folder = self.results / "experiments" / self.store.experiment
        figures = [path for path in sorted(folder.glob("*.png")) if path.is_file() and not path.is_symlink()]
        checksum = f"{zlib.crc32(b''.join(read_plain_file(path) for path in figures)):08x}"
        for path in figures if parent.tags.get("moebench.figures") != checksum else ():
            self.store.log_file(parent.id, path)
        num_cells = len(experiment["cells"])
        if len(statuses) == num_cells:
            status = next((s for s in ("RUNNING", "FAILED", "KILLED") if s in statuses), "FINISHED")
        else:
            status = "RUNNING" if self.live else "KILLED"
        num_done = f"{statuses.count('FINISHED')} of {num_cells} done"
        tags = {"moebench.status": num_done, "moebench.figures": checksum} | describe_tuning(experiment)
        self.store.log(parent.id, tags=tags)
        send_trivial_baselines(self.store, parent, experiment, self.results)
        if status != parent.status:
            self._set_status(parent, status)

    def _send_run(self, source: RunSource, parent: StoredRun) -> tuple[ReplayReport, str]:
        """Send one run; return what was sent, and the run's status in the tracker."""
        run = self._find_or_create_run(source, parent)
        report = ReplayReport(runs=1)
        cursor = Cursor.from_json(run.tags.get("moebench.cursor"))
        points, sent = self._read_unsent(source, run, cursor)
        for batch in split_into_batches(points):
            end = batch[-1].end
            cursor = Cursor(offset=end, step=batch[-1].step, tail=compute_tail_checksum(source.folder.journal, end))
            values, non_finite = collect_unsent_values(batch, sent)
            tags = {"moebench.cursor": json.dumps(asdict(cursor))}
            if non_finite and not report.non_finite and "moebench.non_finite" not in run.tags:
                tags["moebench.non_finite"] = f"first: {non_finite[0].name} at step {non_finite[0].step}"
            self._log(run.id, values, tags)
            note = describe_left_out(batch)
            report += ReplayReport(values=len(values), non_finite=len(non_finite), note=note)
            record_cursor(source, self.store, run.id, cursor)
        return report, self._update_run(source, run, cursor)

    def _find_or_create_run(self, source: RunSource, parent: StoredRun) -> StoredRun:
        run = self.stored.get(source.id)
        if run and was_trained_again(source, run):
            self.store.delete(run.id)  # a tracker cannot replace values
            run = None
        if run is None:
            return self._create(source, parent)
        if run.parent != parent.id:
            self.store.set_parent(run.id, parent.id)  # somebody has deleted the earlier parent
        if "moebench.results" not in run.tags:
            self.store.log(run.id, tags={"moebench.results": results_id(self.results)})
        return run

    def _read_unsent(
        self, source: RunSource, run: StoredRun, cursor: Cursor
    ) -> tuple[list[Point], Collection[tuple[str, int]]]:
        """Return the points after the cursor, and the (metric, step) of values among them that the tracker has.

        After a failure a run repeats steps that may have been sent, at other times: only the tracker knows which. It is
        asked for the metrics that it has up to a step of these points or a later one.
        """
        is_valid = compute_tail_checksum(source.folder.journal, cursor.offset) == cursor.tail
        points = source.read_final_points(cursor.offset if is_valid else 0)
        repeated = {
            name for point in points for name in select_names(point) if point.step <= run.last_steps.get(name, -1)
        }
        return points, self.store.list_logged(run.id, sorted(repeated))

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
            "moebench.results": results_id(self.results),
            "moebench.arm": cell["arm"],
            "moebench.seed": cell["seed"],
            "moebench.git_commit": environment.get("git_commit"),
            "moebench.git_dirty": environment.get("git_dirty"),
            "moebench.host": environment.get("host", platform.node()),
            "moebench.data_digest": cell["data"]["digest"],
            "moebench.status": "running",
            "moebench.tuning_of": parent.tags.get("moebench.tuning_of"),
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
        status = STATUSES.get(source.result.status, "FAILED")
        if run.tags.get("moebench.sent") != source.digest:
            self._send_result(source, run, status)
            record_cursor(source, self.store, run.id, cursor, is_finished=True)
        return status

    def _send_result(self, source: RunSource, run: StoredRun, status: str) -> None:
        assert source.result is not None
        points = source.read_final_points()
        for path in source.attachments:
            self.store.log_file(run.id, path)
        tables = build_tables(source.folder.loads, points)
        if tables:
            self.store.log_tables(run.id, tables)
        end_s = points[-1].time if points else source.folder.result.stat().st_mtime
        end_ms = max(int(1000 * end_s), run.start_ms)
        values = [
            value for value in collect_final_values(source.result, points, end_ms) if value.name not in run.last_values
        ]
        error = {"moebench.error": source.result.error} if source.result.error else {}
        tags = {"moebench.status": source.result.status, "moebench.sent": source.digest, **error}
        note = describe_left_out(points)
        tags |= {"moebench.left_out": note} if note else {}
        self._set_status(run, status, end_ms)
        self._log(run.id, values, tags)

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
            self._set_status(run, status)
            self.store.log(run.id, tags={"moebench.status": "running" if is_running else "stopped"})
        return status

    def _set_status(self, run: StoredRun, status: str, end_ms: int | None = None) -> None:
        # The clock may have been set back since the start.
        self.store.set_status(run.id, status, max(end_ms or int(1000 * time.time()), run.start_ms))
