"""Loads of experts as heat maps, and shares of dropped assignments."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from moebench.analysis.compare.shown_arms import find_tone, select_arms
from moebench.analysis.compare.values import Comparison
from moebench.analysis.html_report.report_runs import Loads, ReportRun
from moebench.analysis.statistics import Values
from moebench.reporting.formatting import format_percent, format_plural

BOUNDS = (0.01, 0.25, 0.5, 0.8, 1.25, 2.0, 4.0)
"""Between the colours of a heat map, as multiples of an even load."""
LEGEND = ("dead", "< ¼", "< ½", "< 0.8", "even", "> 1.25", "> 2", "> 4 ×")
MAX_ROWS, MAX_COLUMNS = 24, 64
"""Largest size of a heat map; further layers are thinned evenly, further experts averaged with neighbours."""


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """The load of one arm: a row for each layer, experts from the busiest to the least busy."""

    arm: str
    tone: str
    layers: tuple[str, ...]
    num_columns: int
    shapes: tuple[str, ...]
    """A path for each colour, in cells."""
    caption: str


@dataclass(frozen=True, kw_only=True)
class DropRow:
    """Shares of assignments of one arm that were dropped for capacity; widths as a share of the largest."""

    arm: str
    train: str
    train_width: float
    evaluated: str
    evaluated_width: float


def build_heat_maps(comparison: Comparison, runs: Sequence[ReportRun]) -> tuple[HeatMap, ...]:
    """Return a heat map for each shown arm that has loads."""
    maps = []
    for arm in select_arms(comparison):
        loads = [run.loads for run in runs if run.arm == arm.arm and run.loads]
        profile = average_loads(loads)
        if profile:
            maps.append(_build_map(arm.arm, find_tone(comparison, arm.arm), profile, len(loads)))
    return tuple(maps)


def average_loads(loads: Sequence[Loads]) -> dict[str, Values]:
    """Return layer -> load over an even load, experts sorted from the busiest on, mean over seeds.

    Seeds number their experts in different orders, so experts are sorted before they are averaged. Layers in which
    seeds have different numbers of experts, and those without a token, are left out.
    """
    profile = {}
    for layer in loads[0] if loads else ():
        load_SE = [np.sort(np.asarray(load[layer]))[::-1] for load in loads if layer in load]
        same = len({len(load_E) for load_E in load_SE}) == 1
        if same and all(load_E.sum() > 0 for load_E in load_SE):
            profile[layer] = np.mean([load_E * len(load_E) / load_E.sum() for load_E in load_SE], axis=0)
    return profile


def _build_map(arm: str, tone: str, profile: dict[str, Values], num_seeds: int) -> HeatMap:
    names = [
        list(profile)[i] for i in np.unique(np.linspace(0, len(profile) - 1, min(len(profile), MAX_ROWS)).astype(int))
    ]
    num_experts = max(len(load_E) for load_E in profile.values())
    rows = [_shorten(profile[name]) for name in names]
    busiest = max(float(load_E.max()) for load_E in profile.values())
    layers, seeds = format_plural(len(profile), "layer"), format_plural(num_seeds, "seed")
    left_out = f", {len(names)} shown" if len(names) < len(profile) else ""
    return HeatMap(
        arm=arm,
        tone=tone,
        layers=tuple(names),
        num_columns=max(map(len, rows)),
        shapes=draw_cells(rows),
        caption=f"{num_experts} experts, {layers}{left_out}; busiest {busiest:.1f} × even; {seeds}",
    )


def draw_cells(rows: Sequence[Values]) -> tuple[str, ...]:
    """Return a path for each colour over the cells of rows, from the top, of loads as multiples of an even load."""
    paths = [""] * (len(BOUNDS) + 1)
    for row, load_X in enumerate(rows):
        for colour, start, length in _find_runs(np.digitize(load_X, BOUNDS)):
            paths[colour] += f"M{start} {row}h{length}v1h-{length}z"
    return tuple(paths)


def _shorten(load_E: Values) -> Values:
    """Return at most `MAX_COLUMNS` values, means of neighbours."""
    parts = np.array_split(load_E, min(len(load_E), MAX_COLUMNS))
    return np.array([part.mean() for part in parts])


def _find_runs(colour_E: np.ndarray) -> list[tuple[int, int, int]]:
    """Return colour, start and length of each run of equal colours."""
    edges = [0, *(np.flatnonzero(np.diff(colour_E)) + 1).tolist(), len(colour_E)]
    return [(int(colour_E[a]), a, b - a) for a, b in pairwise(edges)]


def build_drop_rows(comparison: Comparison) -> tuple[DropRow, ...]:
    """Return a row for each arm with a capacity that dropped anything, in training or in evaluation."""
    rates = {arm.arm: (arm.load.get("train_drop_rate"), arm.load.get("drop_rate")) for arm in comparison.arms}
    largest = max((rate for pair in rates.values() for rate in pair if rate), default=0.0)
    return tuple(
        DropRow(
            arm=arm,
            train=format_percent(train, 2),
            train_width=(train or 0.0) / largest,
            evaluated=format_percent(evaluated, 2),
            evaluated_width=(evaluated or 0.0) / largest,
        )
        for arm, (train, evaluated) in rates.items()
        if train or evaluated
    )
