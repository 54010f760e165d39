"""Send one experiment to one tracker: its runs, each from where it was sent to, and its state."""

import json
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moebench.errors import UsageError
from moebench.runs.experiment_record import SERVING_KEYS
from moebench.runs.journal import Point, read_journal
from moebench.tracking.bookkeeping import CELL, CURSOR, DESCRIBED, NON_FINITE, RESULTS, SENT, describe
from moebench.tracking.cursor import Cursor, compute_tail_checksum, record_cursor
from moebench.tracking.experiment_run import ExperimentRun, build_parent_tags
from moebench.tracking.messages import (
    build_tables,
    collect_final_values,
    collect_unsent_values,
    describe_collapses,
    find_quality,
    split_into_batches,
)
from moebench.tracking.metric_selection import select_names
from moebench.tracking.mlflow_store import MAX_BATCH, MetricValue, MlflowStore, StoredRun
from moebench.tracking.report import ReplayReport
from moebench.tracking.run_description import DESCRIPTION_VERSION, build_note, build_tags, list_params
from moebench.tracking.source import RunSource, results_id
from moebench.tracking.stored_runs import EXPERIMENT, STATUSES, find_stored_runs, was_trained_again

COLLAPSE = "collapse"
"""Tag of a run in which a layer has collapsed."""


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
        problem = self._update_parent(parent, experiment, statuses)
        return report + ReplayReport(problems=(problem,)) if problem else report

    def _find_or_create_parent(self, experiment: Mapping[str, Any]) -> StoredRun:
        if EXPERIMENT in self.stored:
            return self.stored[EXPERIMENT]
        tags = build_parent_tags(experiment, self.store.experiment)
        tags |= {CELL: EXPERIMENT, RESULTS: results_id(self.results)}
        start_ms = int(1000 * float(experiment.get("time") or time.time()))
        return self.store.create(self.store.experiment, tags, start_ms)

    def _update_parent(self, parent: StoredRun, experiment: Mapping[str, Any], statuses: list[str]) -> str:
        """Send the state of the experiment; return what could not be sent, in one line, or an empty text."""
        num_cells = len(experiment["cells"])
        if len(statuses) == num_cells:
            status = next((s for s in ("RUNNING", "FAILED", "KILLED") if s in statuses), "FINISHED")
        else:
            status = "RUNNING" if self.live else "KILLED"
        experiment_run = ExperimentRun(self.results, self.store, parent, experiment)
        try:
            experiment_run.update(f"{statuses.count('FINISHED')} of {num_cells} done")
        except UsageError as error:
            return str(error)
        finally:
            if status != parent.status:
                self._set_status(parent, status)
        return experiment_run.problem

    def _send_run(self, source: RunSource, parent: StoredRun) -> tuple[ReplayReport, str]:
        """Send one run; return what was sent, and the run's status in the tracker."""
        run = self._find_or_create_run(source, parent)
        report = ReplayReport(runs=1)
        cursor = Cursor.from_json(run.tags.get(CURSOR))
        points, sent = self._read_unsent(source, run, cursor)
        for batch in split_into_batches(points):
            end = batch[-1].end
            cursor = Cursor(offset=end, step=batch[-1].step, tail=compute_tail_checksum(source.folder.journal, end))
            values, non_finite = collect_unsent_values(batch, sent, run.last_values.keys())
            tags = {CURSOR: json.dumps(asdict(cursor))}
            if non_finite and not report.non_finite and NON_FINITE not in run.tags:
                tags[NON_FINITE] = f"first: {non_finite[0].name} at step {non_finite[0].step}"
            self._log(run.id, values, tags)
            report += ReplayReport(values=len(values), non_finite=len(non_finite))
            record_cursor(source, self.store, run.id, cursor)
        self._mark_collapse(source, run, points, cursor)
        return report, self._update_run(source, run, cursor)

    def _mark_collapse(self, source: RunSource, run: StoredRun, points: list[Point], cursor: Cursor) -> None:
        """Name the first collapse in a tag, also one after the last checkpoint: a resumed run would repeat it."""
        if COLLAPSE not in run.tags:
            later, _ = read_journal(source.folder.journal, cursor.offset)
            text = describe_collapses([*points, *later])
            if text:
                self.store.log(run.id, tags={COLLAPSE: text})

    def _find_or_create_run(self, source: RunSource, parent: StoredRun) -> StoredRun:
        run = self.stored.get(source.id)
        if run and was_trained_again(source, run):
            self.store.delete(run.id)  # a tracker cannot replace values
            run = None
        if run is None:
            return self._create(source, parent)
        if run.parent != parent.id:
            self.store.set_parent(run.id, parent.id)  # somebody has deleted the earlier parent
        if RESULTS not in run.tags:
            self.store.log(run.id, tags={RESULTS: results_id(self.results)})
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
        cell = source.cell
        tags = build_tags(source, self.store.experiment, results_id(self.results))
        tags |= {key: parent.tags[key] for key in SERVING_KEYS if key in parent.tags}
        start_ms = int(1000 * source.folder.cell.stat().st_mtime)
        return self.store.create(f"{cell['arm']} seed {cell['seed']}", tags, start_ms, parent.id)

    def _update_run(self, source: RunSource, run: StoredRun, cursor: Cursor) -> str:
        """Describe a new run, send the result of a finished one, and return the run's status in the tracker."""
        if run.tags.get(DESCRIBED) != DESCRIPTION_VERSION:
            self._describe(source, run)
        if source.result is None:
            return self._update_unfinished(source, run)
        status = STATUSES.get(source.result.status, "FAILED")
        if run.tags.get(SENT) != source.digest:
            self._send_result(source, run, status)
            record_cursor(source, self.store, run.id, cursor, is_finished=True)
        return status

    def _send_result(self, source: RunSource, run: StoredRun, status: str) -> None:
        result, points = source.result, source.read_final_points()
        assert result is not None
        for path in source.attachments:
            self.store.log_file(run.id, path)
        self.store.log_tables(run.id, build_tables(source.folder, result, points))
        end_s = points[-1].time if points else source.folder.result.stat().st_mtime
        end_ms = max(int(1000 * end_s), run.start_ms)
        stored_names = run.last_values.keys()
        final_values = collect_final_values(result, points, end_ms, stored_names)
        values = [value for value in final_values if value.name not in stored_names]
        if result.status == "done" and result.eval_digest:
            self.store.log_dataset(run.id, str(source.cell["data"]["name"]), result.eval_digest, "test")
        error = {"error": result.error or ""} if result.error or "error" in run.tags else {}
        note = describe(run.tags, build_note(source, self.store.experiment, find_quality(points)))
        self._set_status(run, status, end_ms)
        self._log(run.id, values, {SENT: source.digest, **error, **note})

    def _describe(self, source: RunSource, run: StoredRun) -> None:
        cell, experiment = source.cell, self.store.experiment
        params = {name: value for name, value in list_params(cell).items() if name not in run.params}
        metric = find_quality(source.read_final_points()) if source.result else ""
        tags = build_tags(source, experiment, results_id(self.results))
        tags |= describe(run.tags, build_note(source, experiment, metric))
        self.store.log_dataset(run.id, str(cell["data"]["name"]), str(cell["data"]["digest"]), "training")
        self.store.log_yaml(run.id, cell["config"], "config.yaml")
        changed = {key: value for key, value in tags.items() if run.tags.get(key) != value}
        self.store.log(run.id, params=params, tags={**changed, DESCRIBED: DESCRIPTION_VERSION})

    def _update_unfinished(self, source: RunSource, run: StoredRun) -> str:
        changed_ms = source.folder.journal.stat().st_mtime * 1000 if source.folder.journal.exists() else 0
        # A run that was stopped earlier is running again as soon as its journal grows.
        is_running = self.live and (run.status == "RUNNING" or changed_ms > run.end_ms)
        status = "RUNNING" if is_running else "KILLED"
        if status != run.status:
            self._set_status(run, status)
        return status

    def _set_status(self, run: StoredRun, status: str, end_ms: int | None = None) -> None:
        # The clock may have been set back since the start.
        self.store.set_status(run.id, status, max(end_ms or int(1000 * time.time()), run.start_ms))
