"""Results by domain: means, and differences from the baseline over common seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import fmean

from moebench.analysis import statistics as st
from moebench.analysis.compare.values import Comparison
from moebench.analysis.html_report.report_runs import ReportRun
from moebench.reporting.formatting import MISSING, NumberText, format_number, format_signed
from moebench.reporting.table import Column, Table
from moebench.runs.result import RunResult

MAX_SHOWN = 12
"""Domains on the page; of more, those in which arms differ most. Files of tables have all."""
NUM_SHADES = 4
Values = Mapping[str, Mapping[int, Mapping[str, float]]]
"""Arm -> seed -> domain -> metric."""


@dataclass(frozen=True, kw_only=True)
class DomainTables:
    """Means and differences of all domains, and which the page shows."""

    means: Table
    differences: Table
    shown: tuple[int, ...]
    """Columns of both tables on the page."""
    shades: tuple[tuple[str, ...], ...]
    """Class of the style sheet of each cell of `differences`: better or worse than the baseline, by size."""


def build_domain_tables(comparison: Comparison, runs: Sequence[ReportRun]) -> DomainTables | None:
    """Return the tables; None for a task with one domain."""
    domains = list(dict.fromkeys(name for arm in comparison.arms for name in arm.domains))
    if len(domains) < 2:
        return None
    values = _collect_values(comparison, runs)
    arms = [arm for arm in comparison.arms if values.get(arm.arm)]
    others = [arm.arm for arm in arms if arm.arm != comparison.baseline]
    pairs = {arm: [_subtract(values, arm, comparison.baseline, name) for name in domains] for arm in others}
    columns = (Column(header="arm", align="left", wraps=True), *(Column(header=name) for name in domains))
    metric = comparison.metric.replace("_", " ")
    means = Table(
        title=f"By domain: {metric} on the {comparison.split} split",
        columns=columns,
        rows=tuple(
            (arm.arm, *(format_number(arm.domains[name]) if name in arm.domains else MISSING for name in domains))
            for arm in arms
        ),
    )
    differences = Table(
        title=f"By domain minus {comparison.baseline}: {metric}, without tests",
        columns=columns,
        rows=tuple((arm, *cells) for arm, cells in pairs.items()),
    )
    return DomainTables(
        means=means,
        differences=differences,
        shown=_choose_columns(pairs, len(domains)),
        shades=_shade(comparison, pairs),
    )


def _collect_values(comparison: Comparison, runs: Sequence[ReportRun]) -> Values:
    seeds = {arm.arm: arm.values for arm in comparison.arms}
    values: dict[str, dict[int, dict[str, float]]] = {}
    for run in runs:
        if run.result is not None and run.seed in seeds.get(run.arm, {}):
            metrics = _select_metrics(run.result, comparison)
            values.setdefault(run.arm, {})[run.seed] = metrics
    return values


def _select_metrics(result: RunResult, comparison: Comparison) -> dict[str, float]:
    metrics = result.metrics if comparison.split == "test" else result.validation
    prefix = f"{comparison.metric}/"
    return {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}


def _subtract(values: Values, arm: str, baseline: str, domain: str) -> str:
    """Return the mean paired difference in one domain, with its interval, which files of tables contain."""
    ours, theirs = values.get(arm, {}), values.get(baseline, {})
    pairs = [(ours[seed].get(domain), theirs[seed].get(domain)) for seed in ours if seed in theirs]
    changes = [a - b for a, b in pairs if a is not None and b is not None and isfinite(a - b)]
    if not changes:
        return MISSING
    mean = fmean(changes)
    return NumberText(format_signed(mean), mean, st.mean_interval(changes))


def _choose_columns(pairs: Mapping[str, Sequence[str]], num_domains: int) -> tuple[int, ...]:
    """Return the columns to show: the arm, and the domains with the largest differences."""
    if num_domains <= MAX_SHOWN:
        return tuple(range(num_domains + 1))
    spread = [max((_size(cells[index]) for cells in pairs.values()), default=0.0) for index in range(num_domains)]
    largest = sorted(range(num_domains), key=lambda index: -spread[index])[:MAX_SHOWN]
    return (0, *(index + 1 for index in sorted(largest)))


def _size(cell: str) -> float:
    return abs(cell.value) if isinstance(cell, NumberText) else 0.0


def _shade(comparison: Comparison, pairs: Mapping[str, Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    largest = max((_size(cell) for cells in pairs.values() for cell in cells), default=0.0) or 1.0
    rows = []
    for cells in pairs.values():
        row = [""]
        for cell in cells:
            value = cell.value if isinstance(cell, NumberText) else 0.0
            side = "good" if (value < 0) == comparison.lower_is_better else "bad"
            shade = round(NUM_SHADES * abs(value) / largest)
            row.append(f"{side}-{shade}" if shade else "")
        rows.append(tuple(row))
    return tuple(rows)
