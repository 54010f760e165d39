"""The learning curve of an arm: journals of several seeds become one mean and one band."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np

from moebench.analysis.compare import statistics as st
from moebench.runs.journal import Point

Points = Sequence[Point]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One arm over its seeds at the steps they share; `band` is what lows and highs are: t, range or none.

    `num_seeds` of the `num_started` that have points are in the mean; `num_diverged` of the planned ones diverged.
    """

    arm: str
    steps: st.Values
    means: st.Values
    lows: st.Values
    highs: st.Values
    num_seeds: int
    num_started: int
    band: str
    num_diverged: int = 0


def arm_curve(arm: str, seeds: Mapping[int, Points], metric: str) -> Curve | None:
    """Average an arm over its seeds at the steps they share; None when no seed has a finite point.

    Seeds that have not come as far as the furthest (still training, or stopped) are left out of the mean, or
    its last part would jump from one set of seeds to another; `num_started` tells that there are more.
    """
    found = {seed: series for seed, points in seeds.items() if (series := _series(points, metric))}
    if not found:
        return None
    furthest = max(max(series) for series in found.values())
    level = [series for series in found.values() if max(series) == furthest]
    steps = sorted(set.intersection(*(set(series) for series in level)))
    value_SP = np.array([[series[step] for step in steps] for series in level])
    low_P, high_P, band = _band(value_SP)
    return Curve(
        arm=arm,
        steps=np.array(steps, dtype=np.float64),
        means=value_SP.mean(axis=0),
        lows=low_P,
        highs=high_P,
        num_seeds=len(level),
        num_started=len(found),
        band=band,
    )


def _series(points: Points, metric: str) -> dict[int, float]:
    """Return step -> value of the finite points; a step written again after a resume counts once."""
    return {
        point.step: float(point.metrics[metric])
        for point in points
        if metric in point.metrics and isfinite(point.metrics[metric])
    }


def _band(value_SP: st.Values) -> tuple[st.Values, st.Values, str]:
    if len(value_SP) >= st.MIN_SEEDS:
        bounds = np.array([st.mean_interval(value_S) for value_S in value_SP.T])
        return bounds[:, 0], bounds[:, 1], "t"
    return value_SP.min(axis=0), value_SP.max(axis=0), "range" if len(value_SP) > 1 else "none"
