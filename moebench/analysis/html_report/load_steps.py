"""Loads of experts over the logged training steps, as heat maps of one seed of each arm."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moebench.analysis.compare.shown_arms import find_tone, select_arms
from moebench.analysis.compare.values import Comparison
from moebench.analysis.html_report.loads import draw_cells
from moebench.analysis.html_report.report_runs import ReportRun
from moebench.reporting.formatting import format_plural
from moebench.runs.layer_series import LayerPoint, list_layers, select_layers

MAX_LAYERS = 4
"""Largest number of layers of an arm: the most uneven one and others evenly spaced."""
MAX_STEPS, MAX_EXPERTS = 48, 32
"""Largest size of a map; further steps are thinned evenly, further experts averaged with their neighbours."""


@dataclass(frozen=True, kw_only=True)
class LayerMap:
    """One layer: a column for each logged step, a row for each expert."""

    layer: str
    num_columns: int
    num_rows: int
    shapes: tuple[str, ...]
    """A path for each colour, in cells."""
    caption: str


@dataclass(frozen=True, kw_only=True)
class StepMaps:
    """The layers of one arm."""

    arm: str
    tone: str
    layers: tuple[LayerMap, ...]
    caption: str


def build_step_maps(comparison: Comparison, runs: Sequence[ReportRun]) -> tuple[StepMaps, ...]:
    """Return the maps of each shown arm that has series: those of its first seed, since seeds number experts anew."""
    maps = []
    for arm in select_arms(comparison):
        run = next((run for run in runs if run.arm == arm.arm and run.series), None)
        if run is not None:
            maps.append(_build_maps(arm.arm, find_tone(comparison, arm.arm), run))
    return tuple(maps)


def _build_maps(arm: str, tone: str, run: ReportRun) -> StepMaps:
    names = list_layers(run.series)
    shown = select_layers(run.series, MAX_LAYERS)
    experts = format_plural(max(len(layer.load) for layer in run.series[-1].layers.values()), "expert")
    left_out = f", {len(shown)} of {len(names)} layers" if len(shown) < len(names) else ""
    steps = f"steps {run.series[0].step} to {run.series[-1].step}"
    layers = tuple(_build_layer(name, run.series) for name in shown)
    return StepMaps(arm=arm, tone=tone, layers=layers, caption=f"seed {run.seed}, {experts}, {steps}{left_out}")


def _build_layer(name: str, series: Sequence[LayerPoint]) -> LayerMap:
    layers = [point.layers[name] for point in series if name in point.layers]
    num_experts = len(layers[-1].load)
    layers = [layer for layer in layers if len(layer.load) == num_experts]
    chosen = np.unique(np.linspace(0, len(layers) - 1, min(len(layers), MAX_STEPS)).astype(int))
    columns = [np.array_split(np.asarray(layers[i].load, dtype=float), min(num_experts, MAX_EXPERTS)) for i in chosen]
    load_RP = np.array([[part.mean() for part in column] for column in columns]).T
    mean_P = np.array([max(layers[i].assignments / num_experts, 1e-9) for i in chosen])
    last = layers[-1]
    dead = f", {last.dead_experts} dead" if last.dead_experts else ""
    return LayerMap(
        layer=name,
        num_columns=len(chosen),
        num_rows=len(load_RP),
        shapes=draw_cells(list(load_RP / mean_P)),
        caption=f"layer {name}: busiest {last.max_violation + 1:.1f} × even{dead}",
    )
