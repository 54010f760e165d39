"""The comparison of an experiment as a file in its folder, from where trackers take it."""

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moebench.analysis.compare.comparison import compare
from moebench.analysis.compare.report import build_report, list_lost_cells
from moebench.analysis.compare.values import Comparison, ComparisonMetric
from moebench.analysis.design.protocol import Protocol
from moebench.errors import UsageError
from moebench.experiment.seed_plan import CURRENT_KEY, read_seed_plan
from moebench.reporting.table import Table
from moebench.runs.experiment_record import find_served_experiment, read_records
from moebench.runs.experiment_summary import (
    ArmMean,
    ExperimentSummary,
    SummaryTable,
    digest_results,
    read_summary,
    write_summary,
)
from moebench.runs.folder import RunFolder
from moebench.runs.trivial_baselines import read_recorded
from moebench.schema import DEFAULT_MARGIN
from moebench.tasks.task import TASKS


def build_summary(comparison: Comparison) -> ExperimentSummary:
    """Return what a comparison says in sentences, and its tables as text."""
    differences = {difference.arm: difference.mean for difference in comparison.differences}
    sentences = [comparison.describe_difference(difference.arm) for difference in comparison.differences]
    warnings = [comparison.below_trivial_text, *list_lost_cells(comparison), *comparison.notes]
    return ExperimentSummary(
        metric=comparison.metric,
        split=comparison.split,
        baseline=comparison.baseline,
        num_done=sum(arm.num_done for arm in comparison.arms),
        sentences=tuple(filter(None, [*sentences, *warnings])),
        arms={arm.arm: ArmMean(mean=arm.mean, difference=differences.get(arm.arm)) for arm in comparison.arms},
        tables=tuple(map(_copy_table, build_report(comparison).tables)),
    )


def refresh_summaries(results: Path) -> None:
    """Write the summary of each recorded experiment that has none, or whose runs have changed since.

    An experiment that cannot be compared (no result yet, a damaged one, another task than those of this version) is
    left out: its runs are shown without it.
    """
    records, _ = read_records(results)
    for name, record in records.items():
        if find_served_experiment(record) or not _is_outdated(results, name, record):
            continue
        with contextlib.suppress(UsageError, OSError):
            digest = digest_results(results, record["cells"])  # first: a result may come meanwhile
            summary = build_summary(_compare_record(results, record))
            write_summary(results, name, replace(summary, results_digest=digest))


def _is_outdated(results: Path, name: str, record: Mapping[str, Any]) -> bool:
    try:
        summary = read_summary(results, name)
    except UsageError:  # damaged
        return True
    return summary is None or summary.results_digest != digest_results(results, record["cells"])


def _compare_record(results: Path, record: Mapping[str, Any]) -> Comparison:
    """Compare the recorded cells; raise UsageError where that is not possible."""
    run_results = []
    for cell in record["cells"]:
        result = RunFolder.of(results, cell["id"]).read_result()
        if result is not None:
            run_results.append(replace(result, arm=str(cell.get("arm"))))
    if not run_results:
        raise UsageError(f"{results}: no result yet")
    recorded = next((each for each in read_recorded(record) if each.evaluation.split == "test"), None)
    facts = TASKS.get(str(run_results[0].config.get("task", {}).get("name"))).facts
    comparison = compare(
        run_results,
        expected=[(str(cell.get("arm")), int(cell.get("seed", 0)), cell["id"]) for cell in record["cells"]],
        baseline=str(record.get("baseline")),
        metric=ComparisonMetric(
            name=facts.metric, lower_is_better=facts.lower_is_better, margin=record.get("margin", DEFAULT_MARGIN)
        ),
        protocol=Protocol(
            plan=read_seed_plan(record, record.get(CURRENT_KEY, "")),
            has_several_data=record.get("has_several_data", False),
        ),
    )
    return replace(comparison, trivial_baselines=recorded.baselines) if recorded else comparison


def _copy_table(table: Table) -> SummaryTable:
    return SummaryTable(
        title=table.title,
        columns=tuple(" ".join(column.header.split()) for column in table.columns),
        rows=tuple(tuple(" ".join(cell.split()) for cell in row) for row in table.rows),
    )
