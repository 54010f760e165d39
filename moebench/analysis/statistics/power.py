"""Power of the paired t-test, and the difference that it detects."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import inf, isfinite, sqrt

import numpy as np
from numpy.typing import ArrayLike
from scipy import special, stats
from scipy.optimize import brentq

from moebench.analysis.statistics.levels import ALPHA, MIN_SEEDS, POWER
from moebench.analysis.statistics.seed_values import Values, as_values

NUM_QUANTILES = 32
"""Quantiles of an estimated SD over which the power is averaged."""


@dataclass(frozen=True, kw_only=True)
class SpreadEstimate:
    """The SD of paired differences, estimated from several arms with `df` degrees of freedom."""

    sd: float
    df: float


def estimate_pooled_spread(arm_AS: ArrayLike, baseline_S: ArrayLike) -> SpreadEstimate | None:
    """Estimate the SD of arm minus baseline from all arms, assumed to vary equally; None where it is zero.

    The estimate is B + A. B is the variance over seeds of the mean difference, which all arms share with the baseline;
    A is the residual variance of the two-way table arms × seeds. They are independent, so Satterthwaite's formula
    (Biometrics Bulletin 2, 1946) gives the degrees of freedom. A table with the baseline as one more arm would
    underestimate the SD wherever the other arms are correlated with each other but not with the baseline, as sparse
    arms with shared initial weights are.
    """
    difference_AS = np.asarray(arm_AS, dtype=np.float64) - as_values(baseline_S)
    num_arms, num_seeds = difference_AS.shape
    deviation_AS = difference_AS - difference_AS.mean(1, keepdims=True)
    shared_S = deviation_AS.mean(0)
    df_shared, df_residual = num_seeds - 1, (num_arms - 1) * (num_seeds - 1)
    shared = float((shared_S**2).sum()) / df_shared
    residual = float(((deviation_AS - shared_S) ** 2).sum()) / (num_arms * df_shared)
    if shared + residual == 0:
        return None
    df = (shared + residual) ** 2 / (shared**2 / df_shared + (residual**2 / df_residual if df_residual else 0.0))
    return SpreadEstimate(sd=sqrt(shared + residual), df=df)


def pool_arms(values: Mapping[str, Mapping[int, float]], baseline: Mapping[int, float]) -> SpreadEstimate | None:
    """Estimate the SD from arm -> seed -> value, over the seeds that all have; None below three such seeds."""
    seeds = [seed for seed in baseline if all(seed in of_arm for of_arm in values.values())]
    if not values or len(seeds) < MIN_SEEDS:
        return None
    return estimate_pooled_spread(
        [[of_arm[seed] for seed in seeds] for of_arm in values.values()], [baseline[seed] for seed in seeds]
    )


def smallest_detectable(sd: float | None, num_seeds: int, num_comparisons: int, sd_df: float = inf) -> float | None:
    """Return the true difference that 80 % of repeated experiments would show, in the unit of `sd`.

    `sd` is the SD of the paired differences, estimated with `sd_df` degrees of freedom (inf: known): the power is
    80 % on average over the estimates. The test is the paired t-test at Holm's strictest level, 0.05 divided by the
    number of comparisons. None below three seeds and where the SD is unknown or zero.
    """
    if sd is None or sd == 0 or num_seeds < MIN_SEEDS:
        return None
    return sd * _detectable_sds(num_seeds, ALPHA / max(num_comparisons, 1), sd_df)


@lru_cache(maxsize=256)
def _detectable_sds(num_seeds: int, alpha: float, sd_df: float) -> float:
    """Return the smallest detectable difference in units of an SD estimated with `sd_df` degrees of freedom."""
    estimate_Q = np.ones(1)  # estimate over the true SD
    if isfinite(sd_df):
        estimate_Q = np.sqrt(stats.chi2.ppf((np.arange(NUM_QUANTILES) + 0.5) / NUM_QUANTILES, sd_df) / sd_df)

    def excess(sds: float) -> float:
        return float(_powers(sds * estimate_Q, num_seeds, alpha).mean()) - POWER

    upper = 1.0
    while excess(upper) < 0:
        upper *= 2
    return float(brentq(excess, 0.0, upper, xtol=1e-6))


def t_power(effect: float, num_seeds: int, alpha: float) -> float:
    """Return the power of the two-sided paired t-test for a true difference of `effect` SDs of the pairs.

    scipy.stats.nct and statsmodels' TTestPower return NaN or too small a power at 3 to 5 seeds and strict levels.
    This integrates P(reject | s) over the sampled SD s instead.
    """
    return float(_powers(np.array([effect]), num_seeds, alpha)[0])


def _powers(effect_E: Values, num_seeds: int, alpha: float) -> Values:
    df = num_seeds - 1
    s_Q, width_Q = _build_sd_quadrature()
    density_Q = 2 * s_Q * df * stats.chi2.pdf(s_Q**2 * df, df)
    critical, shift_E1 = stats.t.isf(alpha / 2, df), effect_E[:, None] * sqrt(num_seeds)
    reject_EQ = special.ndtr(shift_E1 - critical * s_Q) + special.ndtr(-shift_E1 - critical * s_Q)
    return np.asarray(reject_EQ @ (width_Q * density_Q))


@lru_cache(maxsize=1)
def _build_sd_quadrature() -> tuple[Values, Values]:
    """Return Gauss-Legendre nodes and weights over the sampled SD in units of the true one."""
    node_Q, weight_Q = special.roots_legendre(400)  # leggauss of NumPy takes half a second
    return 4 * (node_Q + 1), 4 * weight_Q
