"""Reports of evaluations: a model on its tasks, or the arms of an experiment on each task."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moebench.analysis.benchmarks.comparison import OTHER_ITEMS, TaskComparison, average
from moebench.analysis.benchmarks.experiment import ExperimentEvaluation
from moebench.analysis.benchmarks.results import ACCURACIES, TaskResult, compute_trivial_accuracy
from moebench.analysis.compare.legend import MARK_MEANINGS
from moebench.reporting.formatting import (
    MISSING,
    format_number,
    format_p,
    format_plural,
    format_signed,
    format_with_interval,
)
from moebench.reporting.report import Report
from moebench.reporting.table import Column, Table, number_columns

TRIVIAL_NOTE = (
    "chance: a random choice. constant answer: the position that is right most often among these items. unigram: the"
    " frequency of each token in the training split, whatever the context."
)
ERROR_NOTE = "±: standard error over items, for this model; another seed of the same arm differs by more."
COMPARISON_NOTES = (
    "± after a mean: 95 % interval over seeds. difference: arm minus baseline on the same items by the same seeds, with"
    " a 95 % interval over seeds and items; better and worse by p Holm, corrected over the arms of the table.",
    TRIVIAL_NOTE,
)


def build_model_report(results: Sequence[TaskResult], references: Sequence[TaskResult]) -> Report:
    """Return the results of one model, each metric beside what trivial methods reach."""
    by_task = {reference.task: reference for reference in references}
    rows = [_model_row(result, metric, by_task.get(result.task)) for result in results for metric in result.metrics]
    headers = ("value", "chance", "constant answer", "unigram", "items", "truncated")
    table = Table(
        columns=(
            Column(header="task", align="left", wraps=True),
            Column(header="metric", align="left", is_key=True),
            *number_columns(*headers),
        ),
        rows=tuple(rows),
    )
    return Report(
        tables=(table, *filter(None, (_build_domain_table(result) for result in results))),
        problems=tuple(_list_truncated(results)),
        notes=(ERROR_NOTE, TRIVIAL_NOTE),
        values={
            "subject": results[0].subject,
            "tasks": {result.task: _result_values(result, by_task.get(result.task)) for result in results},
        },
    )


def _model_row(result: TaskResult, metric: str, reference: TaskResult | None) -> tuple[str, ...]:
    trivial = _find_trivial(result, metric, reference)
    arrow = "↑" if result.is_better_if_higher(metric) else "↓"
    error = result.standard_error(metric)
    value = format_number(result.metrics[metric])
    return (
        result.task,
        f"{metric} {arrow}",
        value if error is None else f"{value} ± {format_number(error)}",
        *(_format(trivial.get(name)) for name in ("chance", "constant answer", "unigram")),
        str(len(result.items)),
        str(result.num_truncated),
    )


def _find_trivial(result: TaskResult, metric: str, reference: TaskResult | None) -> dict[str, float]:
    """Return what each trivial method reaches on a metric, where it has a value."""
    trivial = compute_trivial_accuracy(result.items) if metric in ACCURACIES else {}
    if reference is not None and metric in reference.metrics:
        trivial["unigram"] = reference.metrics[metric]
    return trivial


def _format(value: float | None) -> str:
    return MISSING if value is None else format_number(value)


def _build_domain_table(result: TaskResult) -> Table | None:
    """Return the main metric of a task by domain; None without domains."""
    domains = result.by_domain(result.main_metric)
    if len(domains) < 2:
        return None
    return Table(
        title=f"{result.task}, {result.main_metric} by domain",
        columns=(Column(header="domain", align="left"), *number_columns("value", "items")),
        rows=tuple((name, format_number(value), str(number)) for name, (value, number) in domains.items()),
        is_detail=True,
    )


def _result_values(result: TaskResult, reference: TaskResult | None) -> dict[str, Any]:
    trivial = {metric: _find_trivial(result, metric, reference) for metric in result.metrics}
    return result.to_dict() | {"trivial": trivial}


def _list_truncated(results: Iterable[TaskResult]) -> list[str]:
    lines = {
        f"{each.task}: {each.num_truncated} of {format_plural(len(each.items), 'item')} are longer than what the model"
        " reads at once, and their beginning is left out"
        for each in results
        if each.num_truncated
    }
    return sorted(lines)


def build_experiment_report(evaluation: ExperimentEvaluation) -> Report:
    """Return the arms of an experiment on each task: one table for each."""
    references = {reference.task: reference for reference in evaluation.references}
    comparisons = evaluation.comparisons
    every = [result for each in comparisons for seeds in each.results.values() for result in seeds.values()]
    return Report(
        heading=(evaluation.title,),
        tables=tuple(
            table
            for each in comparisons
            for table in (_build_task_table(each, references.get(each.task)), _build_arm_domains(each))
            if table is not None
        ),
        problems=(*evaluation.problems, *_list_truncated(every)),
        notes=(*COMPARISON_NOTES, *_explain_marks(comparisons)),
        values={
            "tasks": {each.task: _comparison_values(each, references.get(each.task)) for each in comparisons},
            "problems": list(evaluation.problems),
        },
    )


def _explain_marks(comparisons: Sequence[TaskComparison]) -> list[str]:
    """Return what the marks of arms that are not matched mean."""
    meanings = {**MARK_MEANINGS, OTHER_ITEMS: "other items than the baseline's, as with another text"}
    marks = dict.fromkeys(mark for each in comparisons for difference in each.differences for mark in difference.marks)
    return [f"{mark}: {meanings[mark]}." for mark in marks]


def _build_task_table(comparison: TaskComparison, reference: TaskResult | None) -> Table:
    example = comparison.example
    metrics = list(example.metrics)
    arrows = {metric: "↑" if example.is_better_if_higher(metric) else "↓" for metric in metrics}
    rows = [_arm_row(comparison, arm, metrics) for arm in comparison.results]
    trivial = {metric: _find_trivial(example, metric, reference) for metric in metrics}
    for name in dict.fromkeys(name for values in trivial.values() for name in values):
        cells = [_format(trivial[metric].get(name)) for metric in metrics]
        rows.append((f"({name})", MISSING, *cells, *[MISSING] * 3, "trivial"))
    return Table(
        title=f"{comparison.task}: {format_plural(len(example.items), 'item')}",
        columns=(
            Column(header="arm", align="left", wraps=True, is_key=True),
            *number_columns("seeds", *(f"{metric} {arrows[metric]}" for metric in metrics)),
            *number_columns(f"difference in {comparison.metric}", "95 % interval", "p Holm"),
            Column(header="verdict", align="left", wraps=True),
        ),
        rows=tuple(rows),
    )


def _arm_row(comparison: TaskComparison, arm: str, metrics: Sequence[str]) -> tuple[str, ...]:
    averages = [average(comparison, arm, metric) for metric in metrics]
    means = [MISSING if each is None else format_with_interval(*each) for each in averages]
    row = (arm, str(len(comparison.results[arm])), *means)
    difference = next((each for each in comparison.differences if each.arm == arm), None)
    if difference is None:
        return (*row, *[MISSING] * 3, "baseline" if arm == comparison.baseline else "no baseline")
    pair = difference.difference
    interval = MISSING
    if pair is not None and pair.interval is not None:
        interval = f"[{', '.join(format_signed(bound) for bound in pair.interval)}]"
    return (
        *row,
        MISSING if pair is None else format_signed(pair.mean),
        interval,
        format_p(difference.p_holm),
        f"{difference.verdict} ({', '.join(difference.marks)})" if difference.marks else difference.verdict,
    )


def _build_arm_domains(comparison: TaskComparison) -> Table | None:
    """Return the main metric by domain and arm, means over seeds; None without domains."""
    domains = list(comparison.example.by_domain(comparison.metric))
    if len(domains) < 2:
        return None
    rows = []
    for arm, seeds in comparison.results.items():
        by_seed = [result.by_domain(comparison.metric) for result in seeds.values()]
        cells = [_average_domain(by_seed, domain) for domain in domains]
        rows.append((arm, *(_format(cell) for cell in cells)))
    return Table(
        title=f"{comparison.task}, {comparison.metric} by domain",
        columns=(Column(header="arm", align="left", wraps=True, is_key=True), *number_columns(*domains)),
        rows=tuple(rows),
        is_detail=True,
    )


def _average_domain(by_seed: Sequence[Mapping[str, tuple[float, int]]], domain: str) -> float | None:
    values = [each[domain][0] for each in by_seed if domain in each]
    return sum(values) / len(values) if values else None


def _comparison_values(comparison: TaskComparison, reference: TaskResult | None) -> dict[str, Any]:
    example = comparison.example
    return {
        "metric": comparison.metric,
        "baseline": comparison.baseline,
        "higher_is_better": example.is_better_if_higher(comparison.metric),
        "items": len(example.items),
        "trivial": {metric: _find_trivial(example, metric, reference) for metric in example.metrics},
        "arms": {
            arm: {"seeds": {str(seed): {"run": each.subject, **each.to_dict()} for seed, each in seeds.items()}}
            for arm, seeds in comparison.results.items()
        },
        "differences": {each.arm: each.to_dict() for each in comparison.differences},
    }
