"""The paired difference of two arms over the seeds that both have, and its tests. _S is the axis of the seeds."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from moebench.analysis.statistics.effect import effect_in_seed_sd
from moebench.analysis.statistics.intervals import t_interval
from moebench.analysis.statistics.levels import EXACT_SEEDS, MAX_EXACT_SEEDS, MIN_SEEDS
from moebench.analysis.statistics.power import SpreadEstimate
from moebench.analysis.statistics.seed_values import Interval, as_values, is_constant


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Arm minus baseline over the seeds both have, in the unit of the metric.

    `interval` and `p` are None below three seeds, and where every seed shows the same non-zero difference:
    without a spread there is no test. `p_exact` (sign flips) needs 6 to 16 seeds.
    """

    num_seeds: int
    mean: float
    interval: Interval | None
    p: float | None
    p_exact: float | None
    effect_sd: float | None
    """The difference in units of the seed SD, with Hedges' correction."""
    effect_interval: Interval | None
    sd: float | None

    @property
    def spread(self) -> SpreadEstimate | None:
        """The SD of these differences as an estimate; None below three seeds."""
        return None if self.sd is None else SpreadEstimate(sd=self.sd, df=self.num_seeds - 1)


def compute_paired_difference(arm_S: ArrayLike, baseline_S: ArrayLike) -> PairedDifference:
    """Return the difference of two arms; both hold one value per seed, in the same order of seeds.

    Raises ValueError when the lengths differ, when they are empty, or when a value is not finite.
    """
    a_S, b_S = as_values(arm_S), as_values(baseline_S)
    if a_S.size != b_S.size:
        raise ValueError(f"pairs need one value per seed on both sides, given {a_S.size} and {b_S.size}")
    difference_S = a_S - b_S
    mean, interval, p, sd = float(difference_S.mean()), None, None, None
    if a_S.size >= MIN_SEEDS:
        if is_constant(difference_S, float(max(np.abs(a_S).max(), np.abs(b_S).max()))):
            sd = 0.0
            if not np.any(difference_S):  # identical arms
                interval, p = (0.0, 0.0), 1.0
        else:
            p, sd = float(stats.ttest_rel(a_S, b_S).pvalue), float(difference_S.std(ddof=1))
            interval = t_interval(mean, sd, a_S.size)
    effect = effect_in_seed_sd(a_S, b_S)
    return PairedDifference(
        num_seeds=int(a_S.size),
        mean=mean,
        interval=interval,
        p=p,
        p_exact=sign_flip_p(difference_S) if p is not None else None,
        effect_sd=effect.value if effect else None,
        effect_interval=effect.interval if effect else None,
        sd=sd,
    )


def sign_flip_p(differences_S: ArrayLike) -> float | None:
    """Return the exact two-sided p of the sign-flip test for 6 to 16 seeds, else None."""
    d_S = as_values(differences_S)
    if not EXACT_SEEDS <= d_S.size <= MAX_EXACT_SEEDS:
        return None
    # n_resamples of at least the number of patterns: they are enumerated, without a random generator.
    test = stats.permutation_test((d_S,), np.mean, permutation_type="samples", n_resamples=2**d_S.size)
    return float(test.pvalue)
