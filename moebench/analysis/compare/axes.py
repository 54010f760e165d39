"""Grids with several axes: one row for each value of the first axis, one column for each of the second."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moebench.analysis.compare.values import ArmSummary, Comparison
from moebench.analysis.compare.verdict import DECIDED
from moebench.experiment.axes import ARM
from moebench.reporting.formatting import MISSING, format_signed, format_with_interval
from moebench.reporting.table import Column, Table

ROW_KEYS = ("router", ARM, "layout")
"""Grid keys that make rows, and lines of the figure, before others do."""


@dataclass(frozen=True, kw_only=True)
class AxisGrid:
    """The arms of a comparison by their values on two axes, for one combination of values of the other axes."""

    row_key: str
    column_key: str
    others: str
    """Labels of the values of the other axes; empty where there are two axes."""
    rows: dict[str, dict[str, ArmSummary]]
    """Row label -> column label -> arm; an arm to which the column key means nothing is in every column."""
    columns: tuple[str, ...]
    constant: tuple[str, ...]
    """Rows whose arm is the same in every column."""


def arrange_axes(comparison: Comparison) -> tuple[AxisGrid, ...]:
    """Return the arms on two axes; nothing for a grid with fewer than two axes of several values."""
    keys = _list_varied_keys(comparison)
    if len(keys) < 2:
        return ()
    row_key = next((key for key in ROW_KEYS if key in keys), keys[0])
    column_key, *other_keys = (key for key in keys if key != row_key)
    columns = tuple(dict.fromkeys(axes[column_key] for axes in comparison.axes.values() if column_key in axes))
    groups: dict[str, dict[str, dict[str, ArmSummary]]] = {}
    for others in _list_combinations(comparison, other_keys):
        rows = groups.setdefault(", ".join(others), {})
        for arm in comparison.arms:
            axes = comparison.axes.get(arm.arm, {})
            if all(axes.get(key, other) == other for key, other in zip(other_keys, others, strict=True)):
                row = axes.get(row_key, arm.arm)
                rows.setdefault(row, {}).update({c: arm for c in columns if axes.get(column_key, c) == c})
    return tuple(
        AxisGrid(
            row_key=row_key,
            column_key=column_key,
            others=others,
            rows=rows,
            columns=columns,
            constant=tuple(row for row, arms in rows.items() if _is_constant(comparison, arms, column_key)),
        )
        for others, rows in groups.items()
    )


def _list_varied_keys(comparison: Comparison) -> list[str]:
    """Return the grid keys with several values, in the order of the grid."""
    longest = max(comparison.axes.values(), key=len, default={})
    values = {key: {axes[key] for axes in comparison.axes.values() if key in axes} for key in longest}
    return [key for key, labels in values.items() if len(labels) > 1]


def _list_combinations(comparison: Comparison, keys: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the combinations of labels of some axes that arms have."""
    complete = (axes for axes in comparison.axes.values() if all(key in axes for key in keys))
    return list(dict.fromkeys(tuple(axes[key] for key in keys) for axes in complete))


def _is_constant(comparison: Comparison, arms: dict[str, ArmSummary], key: str) -> bool:
    return all(key not in comparison.axes.get(arm.arm, {}) for arm in arms.values())


def build_axis_tables(comparison: Comparison) -> tuple[Table, ...]:
    """Return a table of means and one of differences for each combination of values of the third and further axes."""
    tables = []
    for grid in arrange_axes(comparison):
        subject = f"{comparison.metric.replace('_', ' ')} on the {comparison.split} split"
        where = f", {grid.others}" if grid.others else ""
        tables += [
            _build_table(comparison, grid, f"By {grid.column_key}: {subject}{where}", _format_mean),
            _build_table(comparison, grid, f"By {grid.column_key}: minus {comparison.baseline}{where}", _format_delta),
        ]
    return tuple(tables)


def _build_table(comparison: Comparison, grid: AxisGrid, title: str, form: Any) -> Table:
    rows = tuple(
        (row, *(form(comparison, arms[column]) if column in arms else MISSING for column in grid.columns))
        for row, arms in grid.rows.items()
    )
    notes = (f"{', '.join(grid.constant)}: the same runs in every column",) if grid.constant else ()
    return Table(
        title=title,
        columns=(
            Column(header=grid.row_key, align="left", wraps=True),
            *(Column(header=column, wraps=True) for column in grid.columns),
        ),
        rows=rows,
        notes=notes,
    )


def _format_mean(comparison: Comparison, arm: ArmSummary) -> str:
    return format_with_interval(arm.mean, arm.interval)


def _format_delta(comparison: Comparison, arm: ArmSummary) -> str:
    difference = comparison.find_difference(arm.arm)
    if difference is None:
        return MISSING
    delta = format_with_interval(difference.mean, difference.interval, format_signed)
    verdict = comparison.describe_verdict(arm.arm)
    return f"{delta} {verdict}" if verdict.split(",")[0] in DECIDED or "diverged" in verdict else delta
