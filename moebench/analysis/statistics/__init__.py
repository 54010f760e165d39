"""Statistics of paired seeds, for three to ten of them: differences, intervals, tests, corrections, power."""

from moebench.analysis.statistics.correction import correct_family, holm
from moebench.analysis.statistics.crossed import CrossedDifference, compute_crossed_difference
from moebench.analysis.statistics.differences import PairedDifference, compute_paired_difference, sign_flip_p
from moebench.analysis.statistics.effect import StandardisedEffect, effect_in_seed_sd
from moebench.analysis.statistics.equivalence import equivalence_p
from moebench.analysis.statistics.intervals import mean_interval, t_interval
from moebench.analysis.statistics.levels import (
    ALPHA,
    CONFIDENCE,
    EQUIVALENCE_SEEDS,
    EXACT_SEEDS,
    MIN_SEEDS,
    POWER,
)
from moebench.analysis.statistics.power import (
    SpreadEstimate,
    estimate_pooled_spread,
    pool_arms,
    smallest_detectable,
    t_power,
)
from moebench.analysis.statistics.seed_values import Interval, Values, compute_variance
from moebench.analysis.statistics.skew import skewness_p
from moebench.analysis.statistics.table_noise import MAX_SD_RATIO, spread_p, table_spread

__all__ = [
    "ALPHA",
    "CONFIDENCE",
    "EQUIVALENCE_SEEDS",
    "EXACT_SEEDS",
    "MAX_SD_RATIO",
    "MIN_SEEDS",
    "POWER",
    "CrossedDifference",
    "Interval",
    "PairedDifference",
    "SpreadEstimate",
    "StandardisedEffect",
    "Values",
    "compute_crossed_difference",
    "compute_paired_difference",
    "compute_variance",
    "correct_family",
    "effect_in_seed_sd",
    "equivalence_p",
    "estimate_pooled_spread",
    "holm",
    "mean_interval",
    "pool_arms",
    "sign_flip_p",
    "skewness_p",
    "smallest_detectable",
    "spread_p",
    "t_interval",
    "t_power",
    "table_spread",
]
