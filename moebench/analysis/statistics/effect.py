"""The standardised effect: a difference in units of the SD between seeds, with Hedges' correction and an interval."""

from dataclasses import dataclass
from math import exp, lgamma, sqrt

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from moebench.analysis.statistics.levels import CONFIDENCE, MIN_SEEDS
from moebench.analysis.statistics.seed_values import Interval, as_values, compute_variance, is_constant


@dataclass(frozen=True, kw_only=True)
class StandardisedEffect:
    """A paired difference over the pooled seed SD; `interval` covers the true ratio in 95 % of repeats."""

    value: float
    interval: Interval | None


def effect_in_seed_sd(arm_S: ArrayLike, baseline_S: ArrayLike) -> StandardisedEffect | None:
    """Return the mean paired difference divided by the pooled seed SD, sqrt((s_arm^2 + s_baseline^2) / 2).

    It relates the difference to the effect of another seed; the sign is that of arm - baseline. Hedges' factor removes
    the bias of small samples; its degrees of freedom are those of the pooled variance of two dependent samples
    (Satterthwaite), between n - 1 and 2 (n - 1). The interval is that of the non-centrality of the paired t, rescaled
    (Algina and Keselman, Educ. Psychol. Meas. 63, 2003, doi:10.1177/0013164403256358).
    None below three seeds, and when seeds change neither arm although the arms differ; without an interval where every
    seed shows the same difference.
    """
    a_S, b_S = as_values(arm_S), as_values(baseline_S)
    if a_S.size < MIN_SEEDS:
        return None
    difference_S = a_S - b_S
    mean, variances = float(difference_S.mean()), (compute_variance(a_S), compute_variance(b_S))
    pooled = sqrt(sum(variances) / 2)
    if pooled == 0:
        return StandardisedEffect(value=0.0, interval=None) if mean == 0 else None
    covariance = float(np.cov(a_S, b_S)[0, 1]) if all(variances) else 0.0
    df = (a_S.size - 1) * sum(variances) ** 2 / (sum(v**2 for v in variances) + 2 * covariance**2)
    interval = None
    if not is_constant(difference_S, float(max(np.abs(a_S).max(), np.abs(b_S).max()))):
        unit = float(difference_S.std(ddof=1)) / sqrt(a_S.size)
        low, high = _noncentrality_interval(mean / unit, a_S.size - 1)
        interval = (low * unit / pooled, high * unit / pooled)
    return StandardisedEffect(value=_hedges_factor(df) * mean / pooled, interval=interval)


def _hedges_factor(df: float) -> float:
    """Return what makes a standardised effect of an SD with these degrees of freedom unbiased."""
    return exp(lgamma(df / 2) - lgamma((df - 1) / 2)) / sqrt(df / 2)


def _noncentrality_interval(t: float, df: int) -> Interval:
    """Return the non-centralities for which t is the 97.5 % and the 2.5 % quantile."""
    tail = (1 - CONFIDENCE) / 2
    return float(special.nctdtrinc(df, 1 - tail, t)), float(special.nctdtrinc(df, tail, t))
