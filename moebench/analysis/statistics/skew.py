"""Rare bad seeds: whether the seeds of the arms of a table scatter further to one side than normal noise does."""

from math import sqrt

import numpy as np
from numpy.typing import ArrayLike
from scipy import special, stats

from moebench.analysis.statistics.seed_values import Values


def skewness_p(value_AS: ArrayLike) -> Values:
    """Return p of the test that normal noise has no such tail of large values: small for rare large ones.

    `value_AS`: arms × seeds, three seeds or more, each arm with some spread; leading axes are several tables. The mean
    of the arms' skewness is compared with a normal distribution: its variance for normal samples is
    6 (n - 2) / ((n + 1) (n + 3)), and skewness correlates as the cube of the values does. That correlation is estimated
    by the mean over pairs of arms; negative ones count as none.
    """
    x_AS = np.asarray(value_AS, dtype=np.float64)
    num_arms, num_seeds = x_AS.shape[-2:]
    scale = sqrt(6 * (num_seeds - 2) / ((num_seeds + 1) * (num_seeds + 3)))
    unit_AS = x_AS - x_AS.mean(-1, keepdims=True)
    unit_AS = unit_AS / np.sqrt((unit_AS**2).sum(-1, keepdims=True))
    pairs = max(num_arms * (num_arms - 1), 1)
    correlation = np.clip(((unit_AS.sum(-2) ** 2).sum(-1) - num_arms) / pairs, 0, 1)
    variance = num_arms + num_arms * (num_arms - 1) * correlation**3
    p: Values = special.ndtr(-stats.skew(x_AS, axis=-1).sum(-1) / scale / np.sqrt(variance))
    return p
