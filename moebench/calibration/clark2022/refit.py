"""Refit of table 3: whether the published coefficients are inside the bootstrap intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moebench.analysis.scaling.bootstrap import Bootstrap, bootstrap_law
from moebench.analysis.scaling.report import FORMULA, describe_interval, format_coefficient, summarise_estimate
from moebench.calibration.clark2022.curves import DENSE, Evaluation, select_points
from moebench.calibration.clark2022.published import CUTOFF_PARAMS, PUBLISHED
from moebench.errors import UsageError
from moebench.reporting.formatting import format_count
from moebench.reporting.report import Report
from moebench.reporting.table import Column, Table, number_columns

MIN_RUNS = 20
"""Fewer runs of a router than this are no part of the published file."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Refit:
    """One router."""

    router: str
    num_runs: int
    bootstrap: Bootstrap


def refit(evaluations: Sequence[Evaluation], num_replicates: int, seed: int) -> list[Refit]:
    """Fit the law of each router; raise UsageError where its runs are missing."""
    refits = []
    for router in PUBLISHED:
        points = select_points(list(evaluations), router)
        if len(points) < MIN_RUNS:
            raise UsageError(
                f"data: {len(points)} runs of {router} and {DENSE} are those of table 3 (at least {MIN_RUNS})"
            )
        bootstrap = bootstrap_law(points, "saturating", num_replicates, seed)
        refits.append(Refit(router=router, num_runs=len(points), bootstrap=bootstrap))
    return refits


def build_report(refits: Sequence[Refit]) -> Report:
    """Return the table of coefficients, published and refitted, and their numbers."""
    values = [_summarise(each) for each in refits]
    columns = (
        Column(header="router", align="left", is_key=True),
        Column(header="coefficient", align="left", is_key=True),
        *number_columns("published", "here", "95 % interval"),
        Column(header="published is", align="left"),
        Column(header="identification", align="left"),
    )
    rows = tuple(_format_row(router["router"], row) for router in values for row in router["coefficients"])
    notes = tuple(
        f"{each.router}: {each.num_runs} runs, root mean square {each.bootstrap.fit.rms:.4f} in log10 of the loss;"
        f" experts stop helping at {format_count(each.bootstrap.fit.law.cutoff_params)} parameters"
        f" (published {format_count(CUTOFF_PARAMS[each.router])})."
        for each in refits
    )
    legend = (
        f"{FORMULA}; published: table 3. Interval: {len(refits[0].bootstrap.laws)} bootstrap fits that resample sizes"
        " and the runs of each. Not identified: it spans more than a decade; weakly: more than half of one."
    )
    return Report(tables=(Table(columns=columns, rows=rows),), notes=(*notes, legend), values={"routers": values})


def _summarise(each: Refit) -> dict[str, Any]:
    published = PUBLISHED[each.router]
    rows = []
    for estimate in each.bootstrap.estimates:
        value = float(getattr(published, estimate.name))
        rows.append(summarise_estimate(estimate) | {"published": value, "contains_published": estimate.contains(value)})
    return {
        "router": each.router,
        "runs": each.num_runs,
        "rms": each.bootstrap.fit.rms,
        "cutoff_params": each.bootstrap.fit.law.cutoff_params,
        "published_cutoff_params": CUTOFF_PARAMS[each.router],
        "coefficients": rows,
    }


def _format_row(router: str, row: dict[str, Any]) -> tuple[str, ...]:
    name = row["name"]
    return (
        router,
        name,
        format_coefficient(name, row["published"]),
        format_coefficient(name, row["value"]),
        describe_interval(name, row["low"], row["high"]),
        "inside" if row["contains_published"] else "OUTSIDE",
        row["identification"],
    )
