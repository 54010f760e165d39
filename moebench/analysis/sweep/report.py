"""The report of a curve: a table with one row for each arm and setting."""

from moebench.analysis.sweep.pareto import Front, find_front
from moebench.analysis.sweep.points import AS_TRAINED, LOAD_METRICS, Curve, Point
from moebench.reporting.formatting import MISSING, NumberText, format_count, format_with_interval
from moebench.reporting.metrics import format_metric, metric_headers
from moebench.reporting.report import Report
from moebench.reporting.table import Column, Table


def build_report(curve: Curve) -> Report:
    """Return the curve as a table and as JSON values, with the Pareto front by the intervals of paired differences."""
    front = find_front(curve.points, lower_is_better=curve.lower_is_better)
    measured = metric_headers("mean", "load/flops_per_token", "relative_flops", *LOAD_METRICS)
    headers = [*(axis.name for axis in curve.axes), "seeds", *measured]
    numbers = (Column(header=header, wraps=index >= 3) for index, header in enumerate(headers))
    table = Table(
        title=f"{curve.metric.replace('_', ' ')} by {', '.join(axis.key for axis in curve.axes)},"
        f" {curve.direction} is better",
        columns=(
            Column(header="arm", align="left", wraps=True, is_key=True),
            *numbers,
            Column(header="dominated by", align="left", wraps=True),
        ),
        rows=tuple(_row(point, curve, front, index) for index, point in enumerate(curve.points)),
        notes=(*curve.notes, front.describe()),
    )
    return Report(tables=(table,), values=_to_values(curve, front))


def _row(point: Point, curve: Curve, front: Front, index: int) -> tuple[str, ...]:
    domination = front.dominated.get(index)
    without = AS_TRAINED if not point.settings else MISSING
    return (
        point.arm,
        *(point.settings.get(axis.key, without) for axis in curve.axes),
        str(len(point.quality)),
        format_with_interval(point.mean, point.interval),
        _format_flops(point),
        format_metric("relative_flops", point.relative_flops),
        *(format_metric(name, point.load.get(name)) for name in LOAD_METRICS),
        MISSING if domination is None else domination.by.label,
    )


def _format_flops(point: Point) -> str:
    """Return the mean and half of its interval, both in thousands and so on."""
    if point.flops_interval is None:
        return format_count(point.mean_flops)
    low, high = point.flops_interval
    text = f"{format_count(point.mean_flops)} ± {format_count((high - low) / 2)}"
    return NumberText(text, point.mean_flops, point.flops_interval)


def _to_values(curve: Curve, front: Front) -> dict[str, object]:
    """Return JSON-ready values."""
    points = []
    for index, point in enumerate(curve.points):
        domination = front.dominated.get(index)
        points.append(point.to_dict() | {"dominated": domination.to_dict() if domination else None})
    return {
        "metric": curve.metric,
        "lower_is_better": curve.lower_is_better,
        "vary": [axis.key for axis in curve.axes],
        "points": points,
        "pareto_tests": front.num_tests,
        "notes": list(curve.notes),
    }
