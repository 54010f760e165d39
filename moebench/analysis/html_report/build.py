"""Build the report of an experiment: one HTML file, and the tables on it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebench.analysis.compare.experiment import compare_experiment, list_trained_cells
from moebench.analysis.compare.report import build_report as build_tables
from moebench.analysis.compare.shown_arms import describe_selection, select_arms
from moebench.analysis.compare.values import Comparison, Split
from moebench.analysis.fairness.along_axis import AXIS_LABELS, read_along_axis
from moebench.analysis.fairness.experiment import measure_experiment
from moebench.analysis.fairness.measure import compare_on_axes
from moebench.analysis.fairness.report import add_fairness
from moebench.analysis.fairness.run_curve import Axis as BudgetAxis
from moebench.analysis.fairness.values import Fairness
from moebench.analysis.html_report.curves import STEPS, XAxis, build_curves
from moebench.analysis.html_report.differences import build_forest
from moebench.analysis.html_report.domains import build_domain_tables
from moebench.analysis.html_report.load_steps import build_step_maps
from moebench.analysis.html_report.loads import LEGEND, build_drop_rows, build_heat_maps
from moebench.analysis.html_report.pareto import build_pareto
from moebench.analysis.html_report.provenance import build_provenance_table
from moebench.analysis.html_report.report_runs import ReportRun, read_runs
from moebench.analysis.html_report.settings import build_settings_tables
from moebench.analysis.html_report.verdicts import describe_arms, describe_outcome
from moebench.analysis.transfer.experiment import measure_transfer
from moebench.analysis.transfer.report import add_transfer
from moebench.errors import UsageError
from moebench.experiment.grid import Experiment
from moebench.reporting.formatting import format_plural
from moebench.reporting.html.page import render_page
from moebench.reporting.table import Column, Table

PLACES = {
    "Quality": "quality",
    "By ": "quality",
    "Out of domain": "quality",
    "How sure": "quality",
    "How large": "quality",
    "Seeds that would settle": "quality",
    "Pairing": "quality",
    "Transfer": "quality",
    "Fairness": "fairness",
    "Expert load": "experts",
    "Information": "experts",
    "Compute": "cost",
    "Cost": "cost",
    "Tuning": "tuning",
}
"""How the title of a table of the comparison begins -> the section of the page that it belongs to."""
REST = "further"
CURVE_AXES: Mapping[BudgetAxis, str] = {"tokens": "tokens", "flops": "FLOPs", "seconds": "seconds"}
"""Axes of the curves -> names on the page."""
MAX_SENTENCES = 6
"""Sentences about arms that are shown, decided ones first; the others can be unfolded."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a report is made of."""

    experiment: Experiment
    results: Path
    split: Split = "test"
    allow_mismatch: bool = False
    command: str
    """The command that trains the experiment again."""
    made_at: str
    """Date and time that the page states."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """A report, ready to be written."""

    html: str
    tables: tuple[Table, ...]
    """All tables on the page, in its order."""
    comparison: Comparison


def build_page(source: Source) -> Page:
    """Compare the arms and return the report; raise UsageError where nothing has a result, as `compare` does."""
    experiment = source.experiment
    comparison = compare_experiment(
        experiment, source.results, allow_mismatch=source.allow_mismatch, split=source.split
    )
    cells = list_trained_cells(experiment, source.results)
    runs = read_runs(cells, source.results, comparison.metric)
    budgets = read_budgets(source, comparison)
    report = build_tables(comparison)
    if budgets.fairness is not None:
        report = add_fairness(report, budgets.fairness)
    report = add_transfer(report, measure_transfer(experiment, source.results))
    domains = build_domain_tables(comparison, runs)
    differing, common = build_settings_tables(cells, comparison.baseline)
    lost, provenance = build_lost_table(comparison), build_provenance_table(runs, source.command, source.made_at)
    extra = [*([domains.means, domains.differences] if domains else []), differing, common, lost, provenance]
    values = {
        "name": experiment.name,
        "question": experiment.question,
        "metric": comparison.metric.replace("_", " "),
        "comparison": comparison,
        "status": describe_status(comparison, source.made_at),
        "outcome": describe_outcome(comparison),
        "sentences": describe_arms(comparison),
        "max_sentences": MAX_SENTENCES,
        "forest": build_forest(comparison),
        "shown_arms": [arm.arm for arm in select_arms(comparison)],
        "tables": place_tables(report.tables),
        "curves": build_curves(comparison, runs, budgets.axes),
        "pareto": build_pareto(comparison),
        "heat_maps": build_heat_maps(comparison, runs),
        "step_maps": build_step_maps(comparison, runs),
        "heat_legend": LEGEND,
        "drops": build_drop_rows(comparison),
        "domains": domains,
        "differing": differing,
        "common": common,
        "lost": lost,
        "provenance": provenance,
        "selection": describe_selection(len(select_arms(comparison)), len(comparison.arms)),
        "notes": (*report.caveats, *report.notes),
        "problems": (*list_problems(runs), *budgets.problems),
    }
    tables = (*report.tables, *(table for table in extra if table.rows))
    return Page(html=render_page("report.html", values), tables=tables, comparison=comparison)


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """The arms at equal tokens, FLOPs, parameters and time, and the axes of curves."""

    fairness: Fairness | None
    axes: tuple[XAxis, ...]
    problems: tuple[str, ...] = ()


def read_budgets(source: Source, comparison: Comparison) -> Budgets:
    """Measure what the arms have spent; of a store with a damaged journal nothing, with the reason."""
    try:
        arms = measure_experiment(source.experiment, source.results, comparison)
    except UsageError as error:
        return Budgets(fairness=None, axes=(STEPS,), problems=(str(error),))
    axes = []
    for name, title in CURVE_AXES.items():
        along = read_along_axis(arms, name)
        if along.arms:
            label = AXIS_LABELS[name]
            axes.append(XAxis(name=title, label=label, of_step=along.map_steps(), problem=along.problem))
    fairness = compare_on_axes(arms, ignore_conditions=source.allow_mismatch)
    return Budgets(fairness=fairness, axes=(*axes, STEPS))


def place_tables(tables: Sequence[Table]) -> Mapping[str, list[Table]]:
    """Return section of the page -> its tables of the comparison."""
    placed: dict[str, list[Table]] = {place: [] for place in (*PLACES.values(), REST)}
    for table in tables:
        placed[next((place for start, place in PLACES.items() if table.title.startswith(start)), REST)].append(table)
    return placed


def build_lost_table(comparison: Comparison) -> Table:
    """Return a row for each cell that failed or has no result yet."""
    rows: list[tuple[str, ...]] = [
        (cell.arm, str(cell.seed), "diverged" if cell.diverged else "failed", cell.reason, cell.id)
        for cell in comparison.failed
    ]
    rows += [(cell.arm, str(cell.seed), "missing", cell.reason, cell.id) for cell in comparison.missing]
    text: dict[str, Any] = {"align": "left", "wraps": True}
    return Table(
        title="Cells without a result",
        columns=(
            Column(header="arm", **text),
            Column(header="seed"),
            Column(header="state", **text),
            Column(header="reason", **text),
            Column(header="id", **text),
        ),
        rows=tuple(rows),
    )


def describe_status(comparison: Comparison, made_at: str) -> tuple[str, ...]:
    """Return the facts below the title: size of the experiment, what is missing, when the report was made."""
    num_done = sum(arm.num_done for arm in comparison.arms)
    num_planned = sum(arm.num_planned for arm in comparison.arms)
    seeds = {arm.num_planned for arm in comparison.arms}
    facts = [format_plural(len(comparison.arms), "arm"), format_plural(max(seeds), "seed")]
    facts.append(f"{num_done} of {num_planned} runs finished" if num_done < num_planned else f"{num_done} runs")
    return (*facts, f"{comparison.split} split", made_at)


def list_problems(runs: Sequence[ReportRun]) -> tuple[str, ...]:
    """Return why charts lack runs, one line for each."""
    return tuple(f"{run.arm}, seed {run.seed}: {problem}" for run in runs for problem in run.problems)
