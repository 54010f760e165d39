"""Statistics of paired seeds: the difference of two arms, its interval and power, for three to ten seeds.

Bootstrap intervals with a nominal coverage of 95 % cover 70 to 85 % at three to five seeds; t intervals keep their
coverage, so all intervals here are based on the t distribution. The suffix _S is the axis of the seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import inf, isfinite, sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats
from scipy.optimize import brentq
from statsmodels.stats.multitest import multipletests

ALPHA = 0.05
"""Level of a family of comparisons, after Holm's correction."""
CONFIDENCE = 0.95
POWER = 0.8
MIN_SEEDS = 3
"""With fewer seeds, results are descriptive only."""
EXACT_SEEDS = 6
"""With fewer seeds, the smallest possible sign-flip p is 2 / 2**5 = 0.0625."""
MAX_EXACT_SEEDS = 16
"""Limit of the sign-flip test, which enumerates 2**16 patterns; with more seeds the t-test suffices."""
NUM_QUANTILES = 32
"""Quantiles of an estimated SD over which the power is averaged."""

Interval = tuple[float, float]
Values = NDArray[np.float64]


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
    sd: float | None


def paired_difference(arm_S: ArrayLike, baseline_S: ArrayLike) -> PairedDifference:
    """Return the difference of two arms; both hold one value per seed, in the same order of seeds.

    Raises ValueError when the lengths differ, when they are empty, or when a value is not finite.
    """
    a_S, b_S = _as_values(arm_S), _as_values(baseline_S)
    if a_S.size != b_S.size:
        raise ValueError(f"pairs need one value per seed on both sides, given {a_S.size} and {b_S.size}")
    difference_S = a_S - b_S
    mean, interval, p, sd = float(difference_S.mean()), None, None, None
    if a_S.size >= MIN_SEEDS:
        if _is_constant(difference_S, float(max(np.abs(a_S).max(), np.abs(b_S).max()))):
            sd = 0.0
            if not np.any(difference_S):  # identical arms
                interval, p = (0.0, 0.0), 1.0
        else:
            test = stats.ttest_rel(a_S, b_S)
            low, high = test.confidence_interval(CONFIDENCE)
            interval, p = (float(low), float(high)), float(test.pvalue)
            sd = float(difference_S.std(ddof=1))
    return PairedDifference(
        num_seeds=int(a_S.size),
        mean=mean,
        interval=interval,
        p=p,
        p_exact=sign_flip_p(difference_S) if p is not None else None,
        effect_sd=effect_in_seed_sd(a_S, b_S),
        sd=sd,
    )


def mean_interval(values_S: ArrayLike) -> Interval | None:
    """Return the 95 % t interval of the mean over seeds, or None below three seeds.

    Raises ValueError for NaN and infinity.
    """
    x_S = _as_values(values_S)
    if x_S.size < MIN_SEEDS:
        return None
    mean = float(x_S.mean())
    if _is_constant(x_S, float(np.abs(x_S).max())):
        return mean, mean
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, x_S.size - 1) * x_S.std(ddof=1) / sqrt(x_S.size))
    return mean - half, mean + half


def sign_flip_p(differences_S: ArrayLike) -> float | None:
    """Return the exact two-sided p of the sign-flip test for 6 to 16 seeds, else None."""
    d_S = _as_values(differences_S)
    if not EXACT_SEEDS <= d_S.size <= MAX_EXACT_SEEDS:
        return None
    # n_resamples of at least the number of patterns: they are enumerated, without a random generator.
    test = stats.permutation_test((d_S,), np.mean, permutation_type="samples", n_resamples=2**d_S.size)
    return float(test.pvalue)


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Return the p values of a family, corrected by Holm: the chance of any false claim is at most 5 %."""
    if not p_values:
        return ()
    return tuple(float(p) for p in multipletests(p_values, alpha=ALPHA, method="holm")[1])


def effect_in_seed_sd(arm_S: ArrayLike, baseline_S: ArrayLike) -> float | None:
    """Return the mean paired difference divided by the pooled seed SD, sqrt((s_arm^2 + s_baseline^2) / 2).

    It relates the difference to the effect of another seed; the sign is that of arm - baseline.
    None below three seeds, and when seeds change neither arm although the arms differ.
    """
    a_S, b_S = _as_values(arm_S), _as_values(baseline_S)
    if a_S.size < MIN_SEEDS:
        return None
    mean = float((a_S - b_S).mean())
    pooled = sqrt((_variance(a_S) + _variance(b_S)) / 2)
    if pooled == 0:
        return 0.0 if mean == 0 else None
    return mean / pooled


@dataclass(frozen=True, kw_only=True)
class SpreadEstimate:
    """The SD of paired differences, estimated from several arms with `df` degrees of freedom."""

    sd: float
    df: float


def pooled_spread(arm_AS: ArrayLike, baseline_S: ArrayLike) -> SpreadEstimate | None:
    """Estimate the SD of arm minus baseline from all arms, assumed to vary alike; None where it is zero.

    The estimate is B + A. B is the variance over seeds of the mean difference, which all arms share with the baseline;
    A is the residual variance of the two-way table arms × seeds. They are independent, so Satterthwaite's formula
    (Biometrics Bulletin 2, 1946) gives the degrees of freedom. A table with the baseline as one more arm would
    underestimate the SD wherever the other arms are correlated with each other but not with the baseline, as sparse
    arms with shared initial weights are.
    """
    difference_AS = np.asarray(arm_AS, dtype=np.float64) - _as_values(baseline_S)
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
    s_Q, width_Q = _sampled_sds()
    density_Q = 2 * s_Q * df * stats.chi2.pdf(s_Q**2 * df, df)
    critical, shift_E1 = stats.t.isf(alpha / 2, df), effect_E[:, None] * sqrt(num_seeds)
    reject_EQ = special.ndtr(shift_E1 - critical * s_Q) + special.ndtr(-shift_E1 - critical * s_Q)
    return np.asarray(reject_EQ @ (width_Q * density_Q))


@lru_cache(maxsize=1)
def _sampled_sds() -> tuple[Values, Values]:
    """Return Gauss-Legendre nodes and weights over the sampled SD in units of the true one."""
    node_Q, weight_Q = np.polynomial.legendre.leggauss(400)
    return 4 * (node_Q + 1), 4 * weight_Q


def _as_values(values_S: ArrayLike) -> Values:
    x_S = np.asarray(values_S, dtype=np.float64)
    if x_S.ndim != 1 or x_S.size == 0:
        raise ValueError(f"one value per seed is needed, given an array of shape {x_S.shape}")
    if not np.isfinite(x_S).all():
        bad = [float(x) for x in x_S if not isfinite(x)]
        raise ValueError(f"a mean over seeds needs finite values: {bad[0]} among {x_S.size}")
    return x_S


def _is_constant(x_S: Values, scale: float) -> bool:
    """Return whether the values are equal up to the rounding of numbers of this scale."""
    return bool(np.ptp(x_S) <= 64 * np.finfo(np.float64).eps * scale)


def _variance(x_S: Values) -> float:
    return 0.0 if _is_constant(x_S, float(np.abs(x_S).max())) else float(x_S.var(ddof=1))
