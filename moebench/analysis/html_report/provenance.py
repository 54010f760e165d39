"""Where the numbers of a report come from: code, versions, machines, data, time."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from typing import Any

from moebench.analysis.html_report.report_runs import ReportRun
from moebench.reporting.formatting import format_plural
from moebench.reporting.table import Column, Table
from moebench.runs.environment import describe_version
from moebench.runs.result import RunResult

MAX_VALUES, MAX_LENGTH = 6, 160
"""Different values shown of one fact, and characters of each: files of runs are not trusted."""
FACTS = {
    "commit": "git_commit",
    "Python": "python",
    "torch": "torch",
    "system": "platform",
    "processor": "processor",
    "cores": "cores",
    "threads of a run": "threads",
    "device": "device",
}
"""Row -> key of environment.json."""


def build_provenance_table(runs: Sequence[ReportRun], command: str, made_at: str) -> Table:
    """Return a row for each fact; where runs differ, with the number of runs that have a value."""
    results = [run.result for run in runs if run.result is not None]
    environments = [run.environment for run in runs if run.environment]
    rows = [
        ("repeat with", command),
        ("report made", f"{made_at}, by moebench {describe_version()}"),
        ("runs by moebench", _join(result.version for result in results)),
        *((name, _join(_read(each, key) for each in environments)) for name, key in FACTS.items()),
        ("packages", _join(_list_packages(each) for each in environments)),
        ("data", _join(f"{_get_task(result)}, digest {result.data_digest[:12]}" for result in results)),
        ("evaluation set", _join(result.eval_digest[:12] for result in results)),
        ("training tokens of a run", _join(f"{result.cost.get('train_tokens', 0):,.0f}" for result in _done(results))),
        ("time of all runs", _sum_hours(results)),
    ]
    return Table(
        title="Provenance",
        columns=(
            Column(header="what", align="left", wraps=True),
            Column(header="value", align="left", wraps=True),
        ),
        rows=tuple((name, value) for name, value in rows if value),
    )


def _join(values: Iterable[str]) -> str:
    counts = Counter(value[:MAX_LENGTH] for value in values if value)
    if len(counts) < 2:
        return next(iter(counts), "")
    parts = [f"{value} ({format_plural(count, 'run')})" for value, count in counts.most_common(MAX_VALUES)]
    more = len(counts) - len(parts)
    return "; ".join([*parts, *([f"{more} more"] if more else [])])


def _read(environment: Mapping[str, Any], key: str) -> str:
    value = environment.get(key)
    text = "" if value is None else str(value)
    is_dirty = key == "git_commit" and text and environment.get("git_dirty")
    return f"{text} with changes" if is_dirty else text


def _list_packages(environment: Mapping[str, Any]) -> str:
    packages = environment.get("packages")
    if not isinstance(packages, Mapping):
        return ""
    return ", ".join(f"{name} {version}" for name, version in sorted(packages.items()) if version)


def _get_task(result: RunResult) -> str:
    task = result.config.get("task")
    return str(task.get("name", "")) if isinstance(task, Mapping) else ""


def _done(results: Iterable[RunResult]) -> list[RunResult]:
    return [result for result in results if result.status == "done"]


def _sum_hours(results: Iterable[RunResult]) -> str:
    seconds = [result.throughput.get("total_s", 0.0) for result in results]
    hours = sum(second for second in seconds if isfinite(second)) / 3600
    return f"{hours:.1f} hours" if hours >= 1 else format_plural(round(60 * hours), "minute")
