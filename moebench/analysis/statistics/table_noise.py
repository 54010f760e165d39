"""The noise of a whole table, beside which the noise of one arm may be too small by luck.

Where most seeds are good and a few far worse, an arm without a bad seed looks both better and quieter than it is. Its
paired t-test is then significant far too often; the other arms show the noise that it does not.
"""

from math import sqrt

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from moebench.analysis.statistics.power import SpreadEstimate, estimate_pooled_spread

MAX_SD_RATIO = 3.0
"""An arm counts with at most this times the SD of the median arm, so that one noisy arm does not hide all others."""


def table_spread(arm_AS: ArrayLike, baseline_S: ArrayLike) -> SpreadEstimate | None:
    """Return the SD of paired differences that all arms of a table show together; None where it is zero."""
    difference_AS = np.asarray(arm_AS, dtype=np.float64) - np.asarray(baseline_S, dtype=np.float64)
    deviation_AS = difference_AS - difference_AS.mean(1, keepdims=True)
    sd_A1 = deviation_AS.std(1, ddof=1, keepdims=True)
    limit = MAX_SD_RATIO * sqrt(float(np.median(sd_A1**2)))
    capped_AS = deviation_AS * np.minimum(1.0, np.divide(limit, sd_A1, out=np.ones_like(sd_A1), where=sd_A1 > 0))
    return estimate_pooled_spread(capped_AS, np.zeros(capped_AS.shape[1]))


def spread_p(mean: float, spread: SpreadEstimate, num_seeds: int) -> float:
    """Return the two-sided p of a mean difference over `num_seeds`, given an estimate of the SD of differences."""
    return float(2 * special.stdtr(spread.df, -abs(mean) / spread.sd * sqrt(num_seeds)))
