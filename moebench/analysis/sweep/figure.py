"""The figure and the table of a setting's curve."""

from pathlib import Path

from matplotlib.axes import Axes

from moebench.analysis.compare.table import Grid
from moebench.analysis.sweep.measure import Point, SettingCurve
from moebench.reporting.canvas import look, sheet
from moebench.reporting.formatting import NOTHING, number


def setting_grid(curve: SettingCurve) -> Grid:
    """Return the curve as a table: one row for each arm and value."""
    second = () if curve.by is None else (curve.by.key.split(".")[-1],)
    return Grid(
        title=f"{curve.metric.replace('_', ' ')} by {curve.vary.key}, {_direction(curve)} is better",
        header=("arm", "value", *second, "seeds", "mean", "dropped", "unserved", "FLOPs"),
        rows=tuple(_row(point, with_second=bool(second)) for point in curve.points),
    )


def _row(point: Point, *, with_second: bool) -> tuple[str, ...]:
    interval = point.interval
    half = f" ± {number((interval[1] - interval[0]) / 2)}" if interval else ""
    shares = (point.load.get(name) for name in ("load/drop_rate", "load/unserved"))
    return (
        point.arm,
        point.value,
        *((point.by or NOTHING,) if with_second else ()),
        str(len(point.quality)),
        number(point.mean) + half,
        *(NOTHING if share is None else f"{100 * share:.1f} %" for share in shares),
        f"{100 * point.relative_flops:.1f} %",
    )


def draw_curve(curve: SettingCurve, path: Path) -> Path:
    """Draw the mean over seeds at each value, one line for each arm and second value, with a band of intervals."""
    with sheet(path, curve.title, width=7.5, height=4.4) as figure:
        ax = figure.subplots()
        for index, (name, points) in enumerate(curve.lines().items()):
            _draw_line(ax, name, points, index)
        ax.set_xlabel(curve.vary.key)
        ax.set_ylabel(f"{curve.metric.replace('_', ' ')} ({_direction(curve)} is better)")
        ax.grid(axis="y", color="#e6e6e6", linewidth=0.7)
        ax.legend(frameon=False)
    return path


def _draw_line(ax: Axes, name: str, points: list[Point], index: int) -> None:
    xs = _places([point.value for point in points])
    style = look(index)
    ax.plot(xs, [point.mean for point in points], marker="o", markersize=4, label=name, **style)  # type: ignore[arg-type]
    bands = [point.interval or (min(point.quality.values()), max(point.quality.values())) for point in points]
    ax.fill_between(xs, [low for low, _ in bands], [high for _, high in bands], color=style["color"], alpha=0.12)


def _places(values: list[str]) -> list[float] | list[str]:
    """Return where values stand on the x axis: as numbers where all are, else one after the other."""
    try:
        return [float(value) for value in values]
    except ValueError:
        return values


def _direction(curve: SettingCurve) -> str:
    return "lower" if curve.lower_is_better else "higher"
