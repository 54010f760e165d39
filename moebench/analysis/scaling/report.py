"""The bilinear law of each router as tables: coefficients, and what the experts are worth in dense parameters."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moebench.analysis.scaling.bootstrap import Bootstrap, Estimate, bootstrap_law
from moebench.analysis.scaling.runs import RouterRuns, ScalingRuns
from moebench.reporting.formatting import MINUS, MISSING, format_count, format_plural
from moebench.reporting.report import Report
from moebench.reporting.table import Column, Table, number_columns

DECIMALS = {"a": 4, "b": 4, "c": 4, "d": 3, "e_start": 2, "e_max": 2}
FEW_SIZES = 3
"""Sizes with which intervals may be too narrow (docs/scaling.md)."""
FORMULA = "log10 L = a log10 N + b log10 Ê + c log10 N log10 Ê + d (arXiv:2202.01169, equations 1 and 7)"


@dataclass(frozen=True, kw_only=True, eq=False)
class RouterLaw:
    """The law of one router."""

    runs: RouterRuns
    bootstrap: Bootstrap


def fit_laws(runs: ScalingRuns, num_replicates: int, seed: int) -> list[RouterLaw]:
    """Fit the law of each router that has enough runs."""
    return [
        RouterLaw(runs=each, bootstrap=bootstrap_law(each.points, each.form, num_replicates, seed))
        for each in runs.routers
        if each.form is not None and not each.refusal
    ]


def build_report(runs: ScalingRuns, laws: Sequence[RouterLaw]) -> Report:
    """Return both tables and their numbers."""
    num_replicates = len(laws[0].bootstrap.laws)
    notes = (
        *(_describe_fit(law) for law in laws),
        f"{FORMULA}; L: {runs.metric}, N: active parameters. 95 % intervals: {num_replicates} bootstrap fits that"
        " resample sizes and the runs of each. Not identified: the interval spans more than a decade or contains 0;"
        " weakly: more than half a decade.",
        "Effective parameters: those of the dense model with the same loss, as a multiple of N.",
    )
    return Report(
        tables=(_build_coefficient_table(laws), _build_effective_table(laws)),
        problems=runs.problems,
        notes=notes,
        values={"metric": runs.metric, "replicates": num_replicates, "routers": [_summarise(law) for law in laws]},
    )


def _build_coefficient_table(laws: Sequence[RouterLaw]) -> Table:
    columns = (
        Column(header="router", align="left", wraps=True, is_key=True),
        Column(header="coefficient", align="left", is_key=True),
        *number_columns("value", "95 % interval"),
        Column(header="identification", align="left"),
    )
    rows = tuple(
        (law.runs.label, estimate.name, format_coefficient(estimate.name, estimate.value), *_format_certainty(estimate))
        for law in laws
        for estimate in law.bootstrap.estimates
    )
    return Table(title="Bilinear law of the loss", columns=columns, rows=rows)


def _format_certainty(estimate: Estimate) -> tuple[str, str]:
    is_fixed = estimate.identification == "fixed"
    shown = MISSING if is_fixed else describe_interval(estimate.name, estimate.low, estimate.high)
    return shown, estimate.identification


def _build_effective_table(laws: Sequence[RouterLaw]) -> Table:
    columns = (
        Column(header="router", align="left", wraps=True, is_key=True),
        *number_columns("N", "E", "effective parameters", "95 % interval"),
    )
    rows = tuple(
        (
            law.runs.label,
            format_count(row["num_params"]),
            f"{row['num_experts']:.0f}",
            f"{_format_ratio(row['ratio'])}×",
            f"[{_format_ratio(row['low'])}, {_format_ratio(row['high'])}]",
        )
        for law in laws
        for row in _list_effective_params(law)
    )
    return Table(title="Effective parameters: the dense model with the same loss", columns=columns, rows=rows)


def _list_effective_params(law: RouterLaw) -> list[dict[str, float]]:
    """Return N̄ / N for each combination of size and experts that was trained."""
    points = law.runs.points
    rows = []
    for size in np.unique(points.size_M):
        of_size = points.size_M == size
        for num_experts in np.unique(points.num_experts_M[of_size]):
            num_params = float(points.num_params_M[of_size & (points.num_experts_M == num_experts)].mean())
            value, low, high = law.bootstrap.effective_params(num_params, float(num_experts))
            rows.append(
                {
                    "num_params": num_params,
                    "num_experts": float(num_experts),
                    "ratio": value / num_params,
                    "low": low / num_params,
                    "high": high / num_params,
                }
            )
    return [row for row in rows if row["num_experts"] > 1]


def _format_ratio(ratio: float) -> str:
    return f"{ratio:.2f}" if 0.01 <= ratio < 1000 else f"{ratio:.0e}"


def _describe_fit(law: RouterLaw) -> str:
    fit, form = law.bootstrap.fit, law.runs.form
    text = f"{law.runs.label}: {format_plural(len(law.runs.points), 'run')}, root mean square {fit.rms:.4f} in log10"
    if form != "saturating":
        fixed = "E_max infinite" if form == "start" else "Ê = E"
        text += f"; too few numbers of experts for six coefficients: {fixed}"
    if len(np.unique(law.runs.points.size_M)) == FEW_SIZES:
        text += f"; {FEW_SIZES} sizes: where they deviate from the law, intervals of a and d cover 90 %, not 95"
    shown = all(law.bootstrap.estimate(name).identification != "not identified" for name in ("b", "c"))
    if shown and math.isfinite(fit.law.cutoff_params):
        text += f"; experts stop helping at {format_count(fit.law.cutoff_params)} parameters"
    return f"{text}."


def _summarise(law: RouterLaw) -> dict[str, Any]:
    fit = law.bootstrap.fit
    cutoff = fit.law.cutoff_params
    return {
        "router": law.runs.label,
        "runs": len(law.runs.points),
        "form": fit.form,
        "rms": fit.rms,
        "cutoff_params": cutoff if math.isfinite(cutoff) else None,
        "coefficients": [summarise_estimate(estimate) for estimate in law.bootstrap.estimates],
        "effective_params": _list_effective_params(law),
    }


def summarise_estimate(estimate: Estimate) -> dict[str, Any]:
    """Return a coefficient ready for JSON, which has no infinity."""
    return {
        key: None if isinstance(value, float) and math.isinf(value) else value
        for key, value in asdict(estimate).items()
    }


def format_coefficient(name: str, value: float) -> str:
    """Format a coefficient with the digits that a fit can give."""
    if math.isinf(value):
        return "∞"
    if abs(value) >= 1e6:
        return format_count(value)
    decimals = 0 if abs(value) >= 100 else DECIMALS[name]
    return f"{value:,.{decimals}f}".replace("-", MINUS)


def describe_interval(name: str, low: float, high: float) -> str:
    """Format an interval."""
    return f"[{format_coefficient(name, low)}, {format_coefficient(name, high)}]"
