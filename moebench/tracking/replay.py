"""Send what run folders hold and a tracker lacks: again and again, after any crash, each point once."""

import json
import platform
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from moebench.errors import UsageError, unknown
from moebench.tracking.journal import Point, RunFolder, read_journal, read_json, recorded_experiments
from moebench.tracking.mlflow_store import MAX_BATCH, MlflowStore, StoredRun, TrackerError, Value, shown

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

    grids = recorded_experiments(results)
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
    for name, grid in recorded_experiments(results).items():
        for cell in grid["cells"] if experiment_name in (None, name) else ():
            folder = RunFolder(results / "runs" / cell["id"])
            if folder.started:
                ends = [path.stat().st_mtime_ns for path in folder.attachments]
                seen.append((cell["id"], folder.checkpointed, max(ends, default=0)))
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
            folder = RunFolder(self.results / "runs" / cell["id"])
            if not folder.started:
                continue
            try:
                sent, status = self._run(folder, parent)
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

    def _run(self, folder: RunFolder, parent: StoredRun) -> tuple[ReplayReport, str]:
        run = self.known.get(folder.path.name) or self._create(folder, parent)
        report = ReplayReport(runs=1)
        cursor = Cursor(**json.loads(run.tags.get("moebench.cursor", "{}")))
        points, sent = self._unsent(folder, run, cursor)
        for batch in _batches(points):
            end = batch[-1].end
            cursor = Cursor(offset=end, step=batch[-1].step, tail=_tail(folder.journal, end))
            values, bad = _values(batch, sent)
            tags = {"moebench.cursor": json.dumps(asdict(cursor))}
            if bad and not report.non_finite and "moebench.non_finite" not in run.tags:
                tags["moebench.non_finite"] = f"first: {bad[0].name} at step {bad[0].step}"
            self._log(run.id, values, tags)
            report += ReplayReport(values=len(values), non_finite=len(bad))
            self._remember(folder, run.id, cursor)
        return report, self._finish(folder, run, cursor)

    def _unsent(
        self, folder: RunFolder, run: StoredRun, cursor: Cursor
    ) -> tuple[list[Point], set[tuple[str, int]]]:
        same = _tail(folder.journal, cursor.offset) == cursor.tail
        points, _ = read_journal(folder.journal, cursor.offset if same else 0)
        if folder.result is None:
            limit = folder.checkpointed
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

    def _create(self, folder: RunFolder, parent: StoredRun) -> StoredRun:
        path = folder.path / "environment.json"
        cell, environment = folder.cell, read_json(path) if path.exists() else {}
        tags = {
            "moebench.cell": folder.path.name,
            "moebench.arm": cell["arm"],
            "moebench.seed": cell["seed"],
            "moebench.git_commit": environment.get("git_commit"),
            "moebench.git_dirty": environment.get("git_dirty"),
            "moebench.host": environment.get("host", platform.node()),
            "moebench.data_digest": cell["data"]["digest"],
            "moebench.status": "running",
        }
        start_ms = int(1000 * (folder.path / "cell.json").stat().st_mtime)
        named = {key: str(value) for key, value in tags.items() if value is not None}
        return self.store.create(f"{cell['arm']} seed {cell['seed']}", named, start_ms, parent.id)

    def _finish(self, folder: RunFolder, run: StoredRun, cursor: Cursor) -> str:
        if run.tags.get("moebench.described") is None:
            self._describe(folder, run)
        if folder.result is None:
            return self._unfinished(folder, run)
        status = _STATUS.get(str(folder.result["status"]), "FAILED")
        if run.tags.get("moebench.sent") != folder.digest:
            for path in folder.attachments:
                self.store.log_file(run.id, path)
            _send_load(self.store, run.id, folder.path / "load.jsonl")
            end_ms = int(1000 * _last_time(folder))
            error = {"moebench.error": str(folder.result["error"])} if folder.result.get("error") else {}
            marks = {"moebench.status": str(folder.result["status"]), "moebench.sent": folder.digest, **error}
            self.store.set_status(run.id, status, end_ms)
            self.store.log(run.id, _final_values(folder.result, end_ms), marks)
            self._remember(folder, run.id, cursor, finished=True)
        return status

    def _describe(self, folder: RunFolder, run: StoredRun) -> None:
        cell = folder.cell
        varies = {str(key): str(value) for key, value in cell.get("varies", {}).items()}
        self.store.log(run.id, params={k: v for k, v in varies.items() if k not in run.params})
        self.store.log_dataset(run.id, str(cell["data"]["name"]), str(cell["data"]["digest"]))
        self.store.log_yaml(run.id, cell["config"], "config.yaml")
        self.store.log(run.id, tags={"moebench.described": "yes"})

    def _unfinished(self, folder: RunFolder, run: StoredRun) -> str:
        changed_ms = folder.journal.stat().st_mtime * 1000 if folder.journal.exists() else 0
        # A run that was stopped earlier is running again as soon as its journal moves.
        at_work = self.live and (run.status == "RUNNING" or changed_ms > run.end_ms)
        status = "RUNNING" if at_work else "KILLED"
        if status != run.status:
            self.store.set_status(run.id, status)
            self.store.log(run.id, tags={"moebench.status": "running" if at_work else "stopped"})
        return status

    def _remember(self, folder: RunFolder, run_id: str, cursor: Cursor, finished: bool = False) -> None:
        # For people and other commands: what was sent can be seen without asking the tracker.
        path = folder.path / "tracking.json"
        try:
            entries = read_json(path) if path.exists() else {}
        except UsageError:
            entries = {}
        sent = {"next_offset": cursor.offset, "last_step": cursor.step, "finished": finished}
        entry = {"run_id": run_id, **sent}
        entries.setdefault(shown(self.uri), {})[self.name] = entry
        fresh = path.with_name("tracking.json.tmp")
        fresh.write_text(json.dumps(entries, indent=1))
        fresh.replace(path)


def _tail(path: Path, offset: int) -> int:
    if offset == 0 or not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, offset - 4096))
        return zlib.crc32(file.read(min(offset, 4096)))


def _batches(points: list[Point]) -> Iterator[list[Point]]:
    batch: list[Point] = []
    size = 0
    for point in points:
        if batch and size + len(point.metrics) > MAX_BATCH:
            yield batch
            batch, size = [], 0
        batch.append(point)
        size += len(point.metrics)
    if batch:
        yield batch


def _values(points: list[Point], sent: set[tuple[str, int]]) -> tuple[list[Value], list[Value]]:
    values = [
        Value(name=name, value=number, time_ms=round(1000 * point.time), step=point.step)
        for point in points
        for name, number in point.metrics.items()
        if (name, point.step) not in sent
    ]
    # MLflow draws NaN as nothing and infinity as 1.8e308, which flattens the chart.
    return [v for v in values if isfinite(v.value)], [v for v in values if not isfinite(v.value)]


def _final_values(result: Mapping[str, Any], end_ms: int) -> list[Value]:
    if result["status"] != "done":
        return []
    # One group: MLflow opens a section of charts for each prefix.
    ends = {**result["cost"], **result["throughput"], **result["metrics"]}
    named = {f"final/{key}": float(x) for key, x in ends.items()}
    step = int(result["step"])
    return [Value(name=k, value=x, time_ms=end_ms, step=step) for k, x in named.items() if isfinite(x)]


def _last_time(folder: RunFolder) -> float:
    points, _ = read_journal(folder.journal)
    return points[-1].time if points else (folder.path / "result.json").stat().st_mtime


def _send_load(store: MlflowStore, run_id: str, path: Path) -> None:
    if not path.exists():
        return
    try:
        # A resumed run may evaluate a step again: the later line counts.
        lines = {line["step"]: line["layers"] for line in map(json.loads, path.read_text().splitlines())}
        rows = [
            [step, int(layer), sum(load), round(max(load) * len(load) / max(sum(load), 1), 4), load]
            for step, layers in sorted(lines.items())
            for layer, load in sorted(layers.items(), key=lambda item: int(item[0]))
        ]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"{path}: not a record of load ({error})") from error
    columns = ["step", "layer", "assignments", "max over mean", "load"]
    store.log_table(run_id, {"columns": columns, "data": rows}, "load.json")
