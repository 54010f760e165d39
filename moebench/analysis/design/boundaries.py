"""Levels of two looks, the second with additional seeds: together they keep the level of one test.

The first look spends a part of the level by the function of O'Brien and Fleming's type (Lan and DeMets, Biometrika 70,
1983). The level of the second is what remains, computed exactly for two t statistics, one of which contains the seeds
of the other.
"""

from functools import lru_cache
from math import sqrt

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats
from scipy.optimize import brentq

NUM_NODES = 96
"""Gauss-Legendre nodes of each of the two integrals; the error is below 1e-7, where one seed is added below 2e-5."""

Values = NDArray[np.float64]


def spend(alpha: float, fraction: float) -> float:
    """Return the part of the level that is spent at a fraction of the seeds: 2 - 2 Φ(z / sqrt(t)), z at 1 - alpha / 2.

    Pocock's function spends more at the first look; in simulations it decides fewer arms with the same runs.
    """
    return float(2 * stats.norm.sf(stats.norm.isf(alpha / 2) / sqrt(fraction)))


@lru_cache(maxsize=512)
def compute_second_level(alpha: float, first_level: float, num_first: int, num_last: int) -> float:
    """Return the level of a two-sided t test of all seeds, after one of the first `num_first` of them.

    Under the null hypothesis either test rejects with probability `alpha` in total; seeds are independent and normal.
    """

    def excess(last_level: float) -> float:
        return first_level + compute_second_rejection(num_first, num_last, first_level, last_level) - alpha

    return float(brentq(excess, (alpha - first_level) * 1e-3, alpha, xtol=alpha * 1e-7))


def compute_second_rejection(num_first: int, num_last: int, first_level: float, last_level: float) -> float:
    """Return the probability that the test of all seeds rejects a true null hypothesis and that of the first does not.

    Both statistics depend only on the direction of the vector of differences, which is uniform on a sphere. With q the
    squared length of its part in the first seeds, v and b the cosines of the two parts with the diagonal, the first
    test rejects for |v| > v_c, the last for |sqrt(f q) v + sqrt((1 - f)(1 - q)) b| > w_c, f = num_first / num_last.
    """
    num_added, fraction = num_last - num_first, num_first / num_last
    v_limit, w_limit = _critical_cosine(num_first, first_level), _critical_cosine(num_last, last_level)
    node_N, weight_N = np.polynomial.legendre.leggauss(NUM_NODES)
    uniform_N = (node_N + 1) / 2
    # q by its quantiles, v in [0, v_limit] by the density of the cosine of a uniform direction: the sign is symmetric.
    q_Q = stats.beta.ppf(uniform_N, num_first / 2, num_added / 2)
    v_V = v_limit * uniform_N
    density_V = 2 * v_limit * (1 - v_V**2) ** ((num_first - 3) / 2) / special.beta(0.5, (num_first - 1) / 2)
    mean_QV = np.sqrt(fraction * q_Q)[:, None] * v_V
    scale_Q1 = np.sqrt((1 - fraction) * (1 - q_Q))[:, None]
    reject_QV = _cosine_tail((w_limit - mean_QV) / scale_Q1, num_added)
    reject_QV += _cosine_tail((w_limit + mean_QV) / scale_Q1, num_added)
    return float(weight_N / 2 @ reject_QV @ (density_V * weight_N / 2))


def _critical_cosine(num_seeds: int, level: float) -> float:
    """Return the |cosine| between differences and diagonal from which on a two-sided t test rejects."""
    t = float(stats.t.isf(level / 2, num_seeds - 1))
    return t / sqrt(t * t + num_seeds - 1)


def _cosine_tail(limit_X: Values, dimension: int) -> Values:
    """Return P(b > limit) of the cosine b between a uniform direction and an axis."""
    if dimension == 1:  # b is -1 or 1
        return np.where(limit_X < -1, 1.0, np.where(limit_X < 1, 0.5, 0.0))
    half_X = special.betainc((dimension - 1) / 2, 0.5, 1 - np.clip(limit_X, -1, 1) ** 2) / 2
    return np.where(limit_X >= 0, half_X, 1 - half_X)
