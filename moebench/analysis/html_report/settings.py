"""The settings of an experiment: what differs between its arms, and what all have in common."""

from collections.abc import Mapping, Sequence
from typing import Any

from moebench.config import flatten, to_plain
from moebench.reporting.formatting import MISSING
from moebench.reporting.table import Column, Table
from moebench.runs.cell import Cell


def build_settings_tables(cells: Sequence[Cell], baseline: str) -> tuple[Table, Table]:
    """Return a table of what each arm has unlike the baseline, and one of the settings that all arms share."""
    of_arm: dict[str, dict[str, str]] = {}
    for cell in cells:
        if cell.arm not in of_arm:
            of_arm[cell.arm] = flatten_settings(to_plain(cell.config))
    reference = of_arm.get(baseline, next(iter(of_arm.values()), {}))
    common = {key: value for key, value in reference.items() if all(each.get(key) == value for each in of_arm.values())}
    rows = [(arm, _describe_differences(settings, reference)) for arm, settings in of_arm.items()]
    key = Column(header="setting", align="left", wraps=True)
    return (
        Table(
            title=f"Settings: what differs from {baseline}",
            columns=(
                Column(header="arm", align="left", wraps=True),
                Column(header="settings", align="left", wraps=True),
            ),
            rows=tuple(rows),
        ),
        Table(
            title="Settings of all arms",
            columns=(key, Column(header="value", align="left", wraps=True)),
            rows=tuple(sorted(common.items())),
        ),
    )


def flatten_settings(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return dotted key -> value as text, without the seed."""
    return {key: "null" if value is None else str(value) for key, value in flatten(settings) if key != "seed"}


def _describe_differences(settings: Mapping[str, str], reference: Mapping[str, str]) -> str:
    """Return `key=value` of each setting that the reference has not, or has otherwise; names of components first."""
    differing = {key: value for key, value in settings.items() if reference.get(key) != value}
    ordered = sorted(differing, key=lambda key: (not key.endswith(".name"), key))
    return ", ".join(f"{key}={differing[key]}" for key in ordered) or MISSING
