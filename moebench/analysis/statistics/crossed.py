"""The difference of two arms over seeds and items that are crossed: every seed's model answers every item.

Both are samples: the claim is about other seeds and other items of the same kind. _SI are the axes of seeds and items.
"""

from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from moebench.analysis.statistics.levels import CONFIDENCE, MIN_SEEDS
from moebench.analysis.statistics.seed_values import Interval, Values


@dataclass(frozen=True, kw_only=True)
class CrossedDifference:
    """The mean difference over seeds and items; without interval and p below three seeds or two items."""

    mean: float
    interval: Interval | None
    p: float | None
    standard_error: float | None
    df: float | None
    """Degrees of freedom of the t distribution, by Satterthwaite's formula."""
    num_seeds: int
    num_items: int


@dataclass(frozen=True, kw_only=True)
class _MeanSquares:
    """The two-way analysis of variance of a table without replication."""

    seeds: float
    items: float
    residual: float

    @classmethod
    def of(cls, x_SI: Values) -> "_MeanSquares":
        num_seeds, num_items = x_SI.shape
        seed_S, item_I = x_SI.mean(1) - x_SI.mean(), x_SI.mean(0) - x_SI.mean()
        residual_SI = x_SI - x_SI.mean() - seed_S[:, None] - item_I
        return cls(
            seeds=float(num_items * (seed_S**2).sum() / (num_seeds - 1)),
            items=float(num_seeds * (item_I**2).sum() / (num_items - 1)),
            residual=float((residual_SI**2).sum() / ((num_seeds - 1) * (num_items - 1))),
        )


def compute_crossed_difference(difference_SI: ArrayLike, weight_I: ArrayLike | None = None) -> CrossedDifference:
    """Return the mean of differences of items, one row for each seed, with a 95 % interval over seeds and items.

    The variance of the mean is (MS seeds + MS items - MS residual) / (S I), at least that of either alone; the degrees
    of freedom are Satterthwaite's, at least the smaller of S - 1 and I - 1 (Clark, J. Verbal Learning Verbal Behav. 12,
    1973, doi:10.1016/S0022-5371(73)80014-3, who tests the same ratio). `weight_I`: weights of items with mean 1 where
    the differences are contributions to a ratio of sums; its linearisation counts. Raises ValueError for values that
    are not finite and for a table without rows or columns.
    """
    x_SI = np.asarray(difference_SI, dtype=np.float64)
    if x_SI.ndim != 2 or x_SI.size == 0 or not np.isfinite(x_SI).all():
        raise ValueError(f"finite differences of seeds by items are needed, given an array of shape {x_SI.shape}")
    (num_seeds, num_items), mean = x_SI.shape, float(x_SI.mean())
    error = df = interval = p = None
    if num_seeds >= MIN_SEEDS and num_items > 1:
        if weight_I is not None:
            x_SI = x_SI - mean * (np.asarray(weight_I, dtype=np.float64) - 1)
        error, df = _estimate_error(_MeanSquares.of(x_SI), num_seeds, num_items)
        if error > 0:
            half = float(stats.t.isf((1 - CONFIDENCE) / 2, df)) * error
            interval, p = (mean - half, mean + half), float(2 * stats.t.sf(abs(mean) / error, df))
        elif mean == 0:  # identical answers
            interval, p = (0.0, 0.0), 1.0
    return CrossedDifference(
        mean=mean, interval=interval, p=p, standard_error=error, df=df, num_seeds=num_seeds, num_items=num_items
    )


def _estimate_error(squares: _MeanSquares, num_seeds: int, num_items: int) -> tuple[float, float]:
    """Return the standard error of the mean and its degrees of freedom."""
    seeds, items, residual = squares.seeds, squares.items, squares.residual
    variance = max(seeds + items - residual, seeds, items)
    df_seeds, df_items = num_seeds - 1, num_items - 1
    spread = seeds**2 / df_seeds + items**2 / df_items + residual**2 / (df_seeds * df_items)
    smallest = min(df_seeds, df_items)  # a mean square that dominates has the degrees of freedom of its own axis
    df = max(variance**2 / spread, smallest) if spread > 0 else float(smallest)
    return sqrt(variance / (num_seeds * num_items)), df
