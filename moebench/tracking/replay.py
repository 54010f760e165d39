"""Send what run folders hold and a tracker lacks: again and again, after any crash, each point once."""

import json
import platform
import time
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moebench.errors import UsageError, unknown
from moebench.runs.folder import read_json
from moebench.runs.journal import Point, read_journal
from moebench.tracking.messages import batches, final_values, send_load, values_of
from moebench.tracking.mlflow_store import MAX_BATCH, MlflowStore, StoredRun, TrackerError, Value, shown
from moebench.tracking.source import RunSource, list_recorded_experiments

_STATUS = {"done": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


@dataclass(frozen=True, kw_only=True)
class ReplayReport:
    """What one replay did: experiments and runs seen, values sent, non-finite values left out, and problems.

    A problem is one line about one run whose files are damaged; the other runs were sent.
    """

    experiments: int = 0
    runs: int = 0
    values: int = 0
    non_finite: int = 0
    problems: tuple[str, ...] = ()

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
    """How far a journal was sent: bytes, the last step, and a checksum of the bytes just before."""

    offset: int = 0
    step: int = -1
    tail: int = 0


def replay(results: Path, uri: str, experiment_name: str | None = None, live: bool = False) -> ReplayReport:
    """Send everything the tracker does not have yet, of one experiment or of all, and say how much that was.

    The cursor travels with each batch as a tag of the run, and a batch that arrives twice is the same rows,
    so nothing is doubled. While a run has no result, its points are sent up to its last checkpoint: what
    follows may be repeated after a crash. ``live`` says that runs without a result are still being worked
    on; otherwise they are marked KILLED. Raises TrackerError when the tracker cannot be used and UsageError
    for an unknown experiment.
    """
    from filelock import FileLock, Timeout

    grids = list_recorded_experiments(results)
    if experiment_name is not None and experiment_name not in grids:
        raise unknown("experiment", experiment_name, grids)
    report = ReplayReport()
    try:
        with FileLock(results / ".tracking.lock", timeout=60):
            for name in [experiment_name] if experiment_name is not None else sorted(grids):
                report += _Sender(results, uri, name, live).send(grids[name])
    except Timeout as error:
        raise TrackerError(f"{results}: another `moebench` is sending to a tracker; try later") from error
    except OSError as error:
        raise TrackerError(f"{results} cannot be written ({error}); run `moebench sync` later") from error
    return report


def sendable(results: Path, experiment_name: str | None = None) -> tuple[tuple[str, int, int], ...]:
    """Return a value that changes when there may be something new to send; asks no tracker."""
    seen = []
    for name, grid in list_recorded_experiments(results).items():
        for cell in grid["cells"] if experiment_name in (None, name) else ():
            source = RunSource.of(results, cell["id"])
            if source.started:
                ends = [path.stat().st_mtime_ns for path in source.attachments]
                seen.append((cell["id"], source.folder.checkpointed_step, max(ends, default=0)))
    return tuple(seen)


class _Sender:
    """One experiment on its way to one tracker."""

    def __init__(self, results: Path, uri: str, name: str, live: bool) -> None:
        self.results, self.uri, self.name, self.live = results, uri, name, live
        self.store = MlflowStore(uri, results / "mlartifacts", name)
        self.known = {run.tags.get("moebench.cell", ""): run for run in self.store.runs()}
        self.found = {run.id for run in self.known.values()}

    def send(self, grid: Mapping[str, Any]) -> ReplayReport:
        parent = self._parent(grid)
        report, statuses = ReplayReport(experiments=1), []
        for cell in grid["cells"]:
            source = RunSource.of(self.results, cell["id"])
            if not source.started:
                continue
            try:
                sent, status = self._run(source, parent)
            except UsageError as error:
                sent, status = ReplayReport(runs=1, problems=(str(error),)), "FAILED"
            report += sent
            statuses.append(status)
        self._close(parent, grid, statuses)
        return report

    def _parent(self, grid: Mapping[str, Any]) -> StoredRun:
        if "experiment" in self.known:
            return self.known["experiment"]
        about = ("question", "file", "baseline")
        tags = {f"moebench.{key}": str(grid[key]) for key in about if grid.get(key)}
        tags |= {"moebench.cell": "experiment", "mlflow.note.content": str(grid.get("question") or "")}
        return self.store.create(self.name, tags, int(1000 * float(grid.get("time") or time.time())))

    def _close(self, parent: StoredRun, grid: Mapping[str, Any], statuses: list[str]) -> None:
        figures = sorted((self.results / "experiments" / self.name).glob("*.png"))
        mark = f"{zlib.crc32(b''.join(path.read_bytes() for path in figures)):08x}"
        for path in figures if parent.tags.get("moebench.figures") != mark else ():
            self.store.log_file(parent.id, path)
        complete = len(statuses) == len(grid["cells"])
        worst = next((s for s in ("RUNNING", "FAILED", "KILLED") if s in statuses), "FINISHED")
        status = ("RUNNING" if self.live else "KILLED") if not complete else worst
        done = f"{statuses.count('FINISHED')} of {len(grid['cells'])} done"
        self.store.log(parent.id, tags={"moebench.status": done, "moebench.figures": mark})
        if status != parent.status:
            self.store.set_status(parent.id, status)

    def _run(self, source: RunSource, parent: StoredRun) -> tuple[ReplayReport, str]:
        run = self.known.get(source.id) or self._create(source, parent)
        report = ReplayReport(runs=1)
        cursor = Cursor(**json.loads(run.tags.get("moebench.cursor", "{}")))
        points, sent = self._unsent(source, run, cursor)
        for batch in batches(points):
            end = batch[-1].end
            cursor = Cursor(offset=end, step=batch[-1].step, tail=_tail(source.folder.journal, end))
            values, bad = values_of(batch, sent)
            tags = {"moebench.cursor": json.dumps(asdict(cursor))}
            if bad and not report.non_finite and "moebench.non_finite" not in run.tags:
                tags["moebench.non_finite"] = f"first: {bad[0].name} at step {bad[0].step}"
            self._log(run.id, values, tags)
            report += ReplayReport(values=len(values), non_finite=len(bad))
            self._remember(source, run.id, cursor)
        return report, self._finish(source, run, cursor)

    def _unsent(self, source: RunSource, run: StoredRun, cursor: Cursor) -> tuple[list[Point], set[tuple[str, int]]]:
        same = _tail(source.folder.journal, cursor.offset) == cursor.tail
        points, _ = read_journal(source.folder.journal, cursor.offset if same else 0)
        if source.result is None:
            limit = source.folder.checkpointed_step
            points = [point for point in points if point.step <= limit]
        if points and run.id in self.found and not (same and cursor.offset):
            # The journal was cut behind the cursor (an older checkpoint was resumed) or the cursor was lost:
            # only the tracker knows what it has.
            return points, self.store.sent(run.id, {name for point in points for name in point.metrics})
        return points, set()

    def _log(self, run_id: str, values: list[Value], tags: Mapping[str, str]) -> None:
        # One step with more metrics than a call takes: the cursor goes with the last call.
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
        named = {key: str(value) for key, value in tags.items() if value is not None}
        return self.store.create(f"{cell['arm']} seed {cell['seed']}", named, start_ms, parent.id)

    def _finish(self, source: RunSource, run: StoredRun, cursor: Cursor) -> str:
        if run.tags.get("moebench.described") is None:
            self._describe(source, run)
        if source.result is None:
            return self._unfinished(source, run)
        status = _STATUS.get(source.result.status, "FAILED")
        if run.tags.get("moebench.sent") != source.digest:
            for path in source.attachments:
                self.store.log_file(run.id, path)
            send_load(self.store, run.id, source.folder.loads)
            end_ms = int(1000 * _last_time(source))
            error = {"moebench.error": source.result.error} if source.result.error else {}
            marks = {"moebench.status": source.result.status, "moebench.sent": source.digest, **error}
            self.store.set_status(run.id, status, end_ms)
            self.store.log(run.id, final_values(source.result, end_ms), marks)
            self._remember(source, run.id, cursor, finished=True)
        return status

    def _describe(self, source: RunSource, run: StoredRun) -> None:
        cell = source.cell
        varies = {str(key): str(value) for key, value in cell.get("varies", {}).items()}
        self.store.log(run.id, params={k: v for k, v in varies.items() if k not in run.params})
        self.store.log_dataset(run.id, str(cell["data"]["name"]), str(cell["data"]["digest"]))
        self.store.log_yaml(run.id, cell["config"], "config.yaml")
        self.store.log(run.id, tags={"moebench.described": "yes"})

    def _unfinished(self, source: RunSource, run: StoredRun) -> str:
        changed_ms = source.folder.journal.stat().st_mtime * 1000 if source.folder.journal.exists() else 0
        # A run that was stopped earlier is running again as soon as its journal moves.
        at_work = self.live and (run.status == "RUNNING" or changed_ms > run.end_ms)
        status = "RUNNING" if at_work else "KILLED"
        if status != run.status:
            self.store.set_status(run.id, status)
            self.store.log(run.id, tags={"moebench.status": "running" if at_work else "stopped"})
        return status

    def _remember(self, source: RunSource, run_id: str, cursor: Cursor, finished: bool = False) -> None:
        # For people and other commands: what was sent can be seen without asking the tracker.
        path = source.folder.path / "tracking.json"
        try:
            entries = read_json(path) if path.exists() else {}
        except UsageError:
            entries = {}
        sent = {"next_offset": cursor.offset, "last_step": cursor.step, "finished": finished}
        entry = {"run_id": run_id, **sent}
        entries.setdefault(redact_credentials(self.uri), {})[self.name] = entry
        fresh = path.with_name("tracking.json.tmp")
        fresh.write_text(json.dumps(entries, indent=1))
        fresh.replace(path)


def _tail(path: Path, offset: int) -> int:
    if offset == 0 or not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, offset - 4096))
        return zlib.crc32(file.read(min(offset, 4096)))


def _last_time(source: RunSource) -> float:
    points, _ = read_journal(source.folder.journal)
    return points[-1].time if points else source.folder.result.stat().st_mtime
