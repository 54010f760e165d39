"""How many seeds a paired test needs for a difference, and to show that there is none."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt

import numpy as np
from scipy import special, stats

from moebench.analysis import statistics as st

MAX_SEEDS = 50
"""Largest number of seeds that is reported: needing more is not a practical way to a verdict."""
NUM_QUANTILES = 200
"""Quantiles of the sampled variance over which the power of an equivalence test is averaged."""


@dataclass(frozen=True, kw_only=True)
class NeededSeeds:
    """Seeds for a verdict with power 0.8, if all were planned from the start; None: more than `MAX_SEEDS`."""

    if_as_observed: int | None
    """Seeds that show a difference, if the true one equals the observed one."""
    for_margin: int | None
    """Seeds that show a difference as large as the margin of equivalence."""
    if_equal: int | None
    """Seeds that show equivalence, if arms are equal."""
    sd: float
    """SD of the paired differences that was assumed, in the unit of the metric."""
    sd_for_observed: float
    """SD at which the seeds that the arm has would show the observed difference."""

    @property
    def is_beyond_seeds(self) -> bool:
        """Whether more seeds alone will show neither the observed difference nor its absence."""
        return self.if_as_observed is None and self.if_equal is None


@lru_cache(maxsize=1024)
def count_seeds_for_difference(effect: float, num_comparisons: int) -> int | None:
    """Return the seeds that show a true difference of `effect` SDs of the pairs with power 0.8.

    At Holm's strictest level, 0.05 over the number of comparisons. None for more than `MAX_SEEDS`.
    """
    alpha = st.ALPHA / max(num_comparisons, 1)
    return _find_first(st.MIN_SEEDS, lambda number: st.t_power(abs(effect), number, alpha))


@lru_cache(maxsize=1024)
def count_seeds_for_equivalence(margin: float, num_comparisons: int) -> int | None:
    """Return the seeds that show that equal arms differ by less than `margin` SDs of the pairs, with power 0.8."""
    alpha = st.ALPHA / max(num_comparisons, 1)
    return _find_first(st.EQUIVALENCE_SEEDS, lambda number: compute_equivalence_power(margin, number, alpha))


def compute_equivalence_power(margin: float, num_seeds: int, alpha: float) -> float:
    """Return the power of two one-sided paired t-tests (TOST) where arms are equal, margin in SDs of the pairs."""
    df = num_seeds - 1
    sd_Q = np.sqrt(stats.chi2.ppf((np.arange(NUM_QUANTILES) + 0.5) / NUM_QUANTILES, df) / df)
    limit_Q = margin * sqrt(num_seeds) - stats.t.isf(alpha, df) * sd_Q  # of the mean, in units of its SD
    return float(np.maximum(2 * special.ndtr(limit_Q) - 1, 0.0).mean())


def _find_first(lowest: int, compute_power: Callable[[int], float]) -> int | None:
    low, high = lowest, MAX_SEEDS
    if compute_power(high) < st.POWER:
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if compute_power(middle) >= st.POWER else (middle + 1, high)
    return low


def compute_needed_seeds(
    difference: float, sd: float, margin: float, *, num_seeds: int, num_comparisons: int
) -> NeededSeeds:
    """Return the seeds that would settle an arm with this observed difference; `sd`: of the pairs, positive."""
    detectable = st.smallest_detectable(1.0, num_seeds, num_comparisons)
    assert detectable is not None
    return NeededSeeds(
        if_as_observed=count_seeds_for_difference(round(abs(difference) / sd, 6), num_comparisons),
        for_margin=count_seeds_for_difference(round(margin / sd, 6), num_comparisons),
        if_equal=count_seeds_for_equivalence(round(margin / sd, 6), num_comparisons),
        sd=sd,
        sd_for_observed=abs(difference) / detectable,
    )
