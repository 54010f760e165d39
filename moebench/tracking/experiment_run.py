"""The run of an experiment in a tracker, the parent of those of its cells: what a reader of the experiment sees first.

It has a description with the verdicts, the tables and the report of the comparison as files, and the mean of each arm
as metrics. All of it is sent again only where it has changed.
"""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from moebench.errors import UsageError
from moebench.runs.experiment_record import SERVING_KEYS
from moebench.runs.experiment_summary import REPORT_FILE, ExperimentSummary, read_summary
from moebench.runs.trivial_baselines import read_recorded
from moebench.tasks.domain_metrics import metric_names
from moebench.tracking.bookkeeping import ATTACHED, NOTE, NOTE_DIGEST, VIEWS_DIGEST, compute_digest, describe
from moebench.tracking.experiment_note import build_experiment_note, describe_tuning
from moebench.tracking.mlflow_store import MetricValue, MlflowStore, StoredRun
from moebench.tracking.source import RunSource, digest_files
from moebench.tracking.trivial_baselines import TAG, collect_baselines, find_mark
from moebench.tracking.views import VIEWS_VERSION, ExperimentView, build_view_tags

TABLE = "comparison.json"
"""File of the first table of the comparison; the others are `comparison-NAME.json`."""
MAX_ARMS = 100
"""Arms whose means are sent."""


class ExperimentRun:
    """The parent run of an experiment; `stored`: what the tracker has of it."""

    def __init__(self, results: Path, store: MlflowStore, stored: StoredRun, experiment: Mapping[str, Any]) -> None:
        self.results, self.store, self.stored, self.experiment = results, store, stored, experiment
        self.summary: ExperimentSummary | None = None
        self.problem = ""
        """Why the summary cannot be sent, in one line; empty if it can or there is none."""
        try:
            self.summary = read_summary(results, store.experiment)
        except UsageError as error:
            self.problem = str(error)

    def update(self, progress: str) -> None:
        """Send what has changed: files, tables, means, trivial baselines, description, views."""
        self._send_files()
        values = _collect_means(self.summary, self.stored) if self.summary else []
        values += collect_baselines(self.experiment, self.stored)
        mark = find_mark(self.experiment, self.results)
        tags = {"progress": progress, TAG: mark, **describe_tuning(self.experiment)}
        question = str(self.experiment.get("question") or "")
        note = build_experiment_note(self.experiment, self.summary, mark)
        changed = {key: value for key, value in tags.items() if self.stored.tags.get(key, "") != value}
        changed |= describe(self.stored.tags, note, earlier=question)
        if values or changed:
            self.store.log(self.stored.id, values, changed)
        self._send_views(question)

    def _send_files(self) -> None:
        """Send figures, the report and the tables of the comparison."""
        folder = self.results / "experiments" / self.store.experiment
        files = [*sorted(folder.glob("*.png")), folder / REPORT_FILE]
        files = [path for path in files if path.is_file() and not path.is_symlink() and not folder.is_symlink()]
        tables = _build_tables(self.summary) if self.summary else {}
        digest = digest_files(files, str(tables))
        if self.stored.tags.get(ATTACHED) == digest or not (files or tables):
            return
        for path in files:
            self.store.log_file(self.stored.id, path)
        if tables:
            self.store.log_tables(self.stored.id, tables)
        self.store.log(self.stored.id, tags={ATTACHED: digest})

    def _send_views(self, question: str) -> None:
        """Send the views of the experiment where its metric, question or cells have changed; keep its description."""
        metric = self._find_metric()
        cells = sorted(cell["id"] for cell in self.experiment["cells"])
        digest = compute_digest(json.dumps([VIEWS_VERSION, metric, question, cells]))
        if not metric or self.stored.tags.get(VIEWS_DIGEST) == digest:
            return
        param = _find_arm_param(self.results, self.experiment)
        view = ExperimentView(metric=metric, arm_param=param, time_ms=self.stored.start_ms)
        tags = build_view_tags(view)
        existing = self.store.read_experiment_tags()
        self.store.set_experiment_tags(tags if existing.get(NOTE) or not question else {**tags, NOTE: question})
        self.store.log(self.stored.id, tags={VIEWS_DIGEST: digest})

    def _find_metric(self) -> str:
        """Return the metric that arms are compared by; empty if it is not known yet."""
        if self.summary:
            return self.summary.metric
        for recorded in read_recorded(self.experiment):
            return recorded.metric
        return str(self.experiment.get("metric") or "")[:200]


def build_parent_tags(experiment: Mapping[str, Any], name: str) -> dict[str, str]:
    """Return the tags of a new parent run that do not change."""
    keys = ("baseline", *SERVING_KEYS)
    tags = {key: str(experiment[key]) for key in keys if experiment.get(key)}
    source = {"mlflow.source.name": str(experiment["file"])} if experiment.get("file") else {}
    question = str(experiment.get("question") or "")
    note = {NOTE: question, NOTE_DIGEST: compute_digest(question)}
    return {**tags, **source, **note, "experiment": name}


def _collect_means(summary: ExperimentSummary, run: StoredRun) -> list[MetricValue]:
    """Return the mean of each arm and its difference to the baseline, as far as the run does not have them."""
    arms = [*summary.arms.items()][:MAX_ARMS]
    names = metric_names(tuple(name for name, _ in arms))
    values = {f"mean/{name}": arm.mean for name, (_, arm) in zip(names, arms, strict=True)}
    values |= {f"difference/{name}": arm.difference for name, (_, arm) in zip(names, arms, strict=True)}
    now_ms = int(1000 * time.time())
    return [
        # Step: the number of finished cells. The value of the highest step is the one that MLflow shows.
        MetricValue(name=name, value=value, time_ms=now_ms, step=max(summary.num_done, run.last_steps.get(name, 0)))
        for name, value in values.items()
        if value is not None and run.last_values.get(name) != value
    ]


def _build_tables(summary: ExperimentSummary) -> dict[str, dict[str, Sequence[Any]]]:
    titles = [table.title.partition(":")[0] for table in summary.tables]
    files = [TABLE, *(f"comparison-{'-'.join(_words(title))}.json" for title in titles[1:])]
    return {
        file: {"columns": [*table.columns], "data": [[*row] for row in table.rows]}
        for file, table in zip(files, summary.tables, strict=True)
    }


def _words(title: str) -> list[str]:
    return "".join(letter if letter.isascii() and letter.isalnum() else " " for letter in title.lower()).split()[:3]


def _find_arm_param(results: Path, experiment: Mapping[str, Any]) -> str:
    """Return the setting that tells arms apart, `router.name` if it does; empty if none does by itself."""
    values: dict[str, dict[str, str]] = {}
    for cell in experiment["cells"]:
        source = RunSource.of(results, cell["id"])
        with suppress(UsageError):
            if source.folder.cell.exists():
                varies = source.cell.get("varies", {})
                values.setdefault(str(source.cell["arm"]), {str(key): str(value) for key, value in varies.items()})
    names = dict.fromkeys(["router.name", *(name for varies in values.values() for name in varies if name != "seed")])
    for name in names:
        if len({varies.get(name) for varies in values.values()}) == len(values) > 1:
            return name
    return ""
