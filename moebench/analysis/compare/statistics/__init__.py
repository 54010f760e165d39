"""Statistics of paired seeds, for three to ten of them: differences, intervals, tests, corrections, power."""

from moebench.analysis.compare.statistics.correction import holm
from moebench.analysis.compare.statistics.differences import PairedDifference, paired_difference, sign_flip_p
from moebench.analysis.compare.statistics.effect import StandardisedEffect, effect_in_seed_sd
from moebench.analysis.compare.statistics.equivalence import equivalence_p
from moebench.analysis.compare.statistics.intervals import mean_interval, t_interval
from moebench.analysis.compare.statistics.levels import (
    ALPHA,
    CONFIDENCE,
    EQUIVALENCE_SEEDS,
    EXACT_SEEDS,
    MARGIN,
    MIN_SEEDS,
    POWER,
)
from moebench.analysis.compare.statistics.power import SpreadEstimate, pooled_spread, smallest_detectable, t_power
from moebench.analysis.compare.statistics.seed_values import Interval, Values

__all__ = [
    "ALPHA",
    "CONFIDENCE",
    "EQUIVALENCE_SEEDS",
    "EXACT_SEEDS",
    "MARGIN",
    "MIN_SEEDS",
    "POWER",
    "Interval",
    "PairedDifference",
    "SpreadEstimate",
    "StandardisedEffect",
    "Values",
    "effect_in_seed_sd",
    "equivalence_p",
    "holm",
    "mean_interval",
    "paired_difference",
    "pooled_spread",
    "sign_flip_p",
    "smallest_detectable",
    "t_interval",
    "t_power",
]
