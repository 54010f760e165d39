"""Intervals over seeds, each by itself and all of a table together.

Bootstrap intervals with a nominal coverage of 95 % cover 70 to 85 % at three to five seeds; t intervals keep their
coverage, so all intervals here are based on the t distribution.
"""

from math import sqrt

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from moebench.analysis.statistics.levels import CONFIDENCE, MIN_SEEDS
from moebench.analysis.statistics.seed_values import Interval, as_values, is_constant


def mean_interval(values_S: ArrayLike) -> Interval | None:
    """Return the 95 % t interval of the mean over seeds, or None below three seeds.

    Raises ValueError for NaN and infinity.
    """
    x_S = as_values(values_S)
    if x_S.size < MIN_SEEDS:
        return None
    mean = float(x_S.mean())
    sd = 0.0 if is_constant(x_S, float(np.abs(x_S).max())) else float(x_S.std(ddof=1))
    return t_interval(mean, sd, x_S.size)


def t_interval(mean: float, sd: float, num_seeds: int, num_intervals: int = 1) -> Interval:
    """Return the t interval of a mean whose sample has this SD; `num_intervals` of them hold together in 95 %.

    Bonferroni: each covers 1 - 0.05 / `num_intervals`. That holds for arms that vary unequally and depend on each
    other in any way, which Dunnett's interval (one variance, a fixed correlation) does not.
    """
    half = float(stats.t.isf((1 - CONFIDENCE) / num_intervals / 2, num_seeds - 1)) * sd / sqrt(num_seeds)
    return mean - half, mean + half
