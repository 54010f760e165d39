"""The report and the figure of a setting's curve."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from moebench.analysis.sweep.measure import LOAD_METRICS, Point, SettingCurve
from moebench.reporting.canvas import line_style, new_figure
from moebench.reporting.formatting import MISSING, format_with_interval
from moebench.reporting.metrics import format_metric, metric_headers
from moebench.reporting.report import Report
from moebench.reporting.table import Column, Table


def build_report(curve: SettingCurve) -> Report:
    """Return the curve as a table with one row for each arm and value, and as JSON values."""
    second = [] if curve.by is None else [curve.by.key.split(".")[-1]]
    headers = ["value", *second, "seeds", *metric_headers("mean", *LOAD_METRICS, "relative_flops")]
    numbers = (Column(header=header, wraps=index >= 3) for index, header in enumerate(headers))
    table = Table(
        title=f"{curve.metric.replace('_', ' ')} by {curve.vary.key}, {_direction(curve)} is better",
        columns=(Column(header="arm", align="left", wraps=True), *numbers),
        rows=tuple(_row(point, has_second=bool(second)) for point in curve.points),
        notes=curve.notes,
    )
    return Report(tables=(table,), values=curve.to_dict())


def _row(point: Point, *, has_second: bool) -> tuple[str, ...]:
    return (
        point.arm,
        point.value,
        *((point.by or MISSING,) if has_second else ()),
        str(len(point.quality)),
        format_with_interval(point.mean, point.interval),
        *(format_metric(name, point.load.get(name)) for name in LOAD_METRICS),
        format_metric("relative_flops", point.relative_flops),
    )


def draw_curve(curve: SettingCurve, path: Path) -> Path:
    """Draw the mean over seeds at each value, one line for each arm and second value, with a band of intervals."""
    with new_figure(path, curve.title, width=7.5, height=4.4) as figure:
        ax = figure.subplots()
        lines = curve.group_by_line()
        handles = [_draw_line(ax, points, index) for index, points in enumerate(lines.values())]
        ax.set_xlabel(curve.vary.key)
        ax.set_ylabel(f"{curve.metric.replace('_', ' ')} ({_direction(curve)} is better)")
        ax.grid(axis="y", color="#e6e6e6", linewidth=0.7)
        ax.legend(handles, [*lines], frameon=False)
    return path


def _draw_line(ax: Axes, points: list[Point], index: int) -> Line2D:
    xs = _to_positions([point.value for point in points])
    style = line_style(index)
    (line,) = ax.plot(xs, [point.mean for point in points], marker="o", markersize=4, **style)  # type: ignore[arg-type]
    bands = [point.interval or (min(point.quality.values()), max(point.quality.values())) for point in points]
    ax.fill_between(xs, [low for low, _ in bands], [high for _, high in bands], color=style["color"], alpha=0.12)
    return line


def _to_positions(values: list[str]) -> list[float] | list[str]:
    """Return positions on the x axis: the values themselves if all are numbers, else categories in their order."""
    try:
        return [float(value) for value in values]
    except ValueError:
        return values


def _direction(curve: SettingCurve) -> str:
    return "lower" if curve.lower_is_better else "higher"
