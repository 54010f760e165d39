"""Trivial baselines in the tables of a comparison: rows below the arms, the mark, the legend."""

from moebench.analysis.compare.values import Comparison
from moebench.reporting.formatting import MISSING, format_number, format_signed
from moebench.tasks.baselines.baseline import TrivialBaseline
from moebench.tasks.task import OUT_OF_DOMAIN

VERDICT, REFERENCE_VERDICT = "trivial", "trivial (reference)"


def list_quality_rows(comparison: Comparison) -> tuple[tuple[str, ...], ...]:
    """Return a row for each trivial baseline, with the columns of the quality table."""
    mean = _mean_of_baseline(comparison)
    rows = []
    for baseline in comparison.trivial_baselines:
        value = baseline.values.get(comparison.metric)
        if value is not None:
            difference = MISSING if mean is None else format_signed(value - mean)
            verdict = REFERENCE_VERDICT if baseline.is_reference else VERDICT
            rows.append((baseline.name, MISSING, format_number(value), difference, MISSING, verdict))
    return tuple(rows)


def list_out_of_domain_rows(comparison: Comparison) -> tuple[tuple[str, ...], ...]:
    """Return a row for each trivial baseline that has a value out of domain, with the columns of that table."""
    arm = next(arm for arm in comparison.arms if arm.arm == comparison.baseline)
    mean, rows = arm.out_of_domain_mean, []
    for baseline in comparison.trivial_baselines:
        value = baseline.values.get(f"{comparison.metric}/{OUT_OF_DOMAIN}")
        if value is not None and mean is not None:
            inside = format_signed(value - baseline.values[comparison.metric])
            rows.append((baseline.name, MISSING, format_number(value), format_signed(value - mean), inside))
    return tuple(rows)


def list_quality_notes(comparison: Comparison) -> tuple[str, ...]:
    """Return the mark, or why there are no trivial baselines: lines below the quality table."""
    problem = f"no trivial baselines: {comparison.trivial_problem}" if comparison.trivial_problem else ""
    return tuple(line for line in (comparison.below_trivial_text, problem) if line)


def explain_trivial_baselines(comparison: Comparison) -> list[str]:
    """Return the legend of the trivial baselines: one line, names with one meaning together."""
    meanings: dict[str, list[TrivialBaseline]] = {}
    for baseline in comparison.trivial_baselines:
        meanings.setdefault(baseline.meaning, []).append(baseline)
    parts = [f"{', '.join(each.name for each in group)}: {meaning}" for meaning, group in meanings.items()]
    if not parts:
        return []
    return [
        f"Trivial baselines, on the same evaluation data without a neural network - {'; '.join(parts)}."
        f" {comparison.baseline} should be better than the reference before a ranking counts (docs/comparing.md)."
    ]


def _mean_of_baseline(comparison: Comparison) -> float | None:
    return next(arm.mean for arm in comparison.arms if arm.arm == comparison.baseline)
