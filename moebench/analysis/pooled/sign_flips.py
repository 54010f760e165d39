"""The sign-flip test of paired differences from several experiments, and the interval that inverts it.

If an arm and the baseline are equal, the differences of each seed may have either sign. Each experiment is weighted by
one over the root mean square of all its differences, which no flip of a seed changes, so the test is exact for any
noise that is symmetric, however few seeds an experiment has. A t test of differences that were divided by their own
estimated SD is not: with 4 experiments of 3 seeds and one arm it rejects equal arms in 22 % of cases (5 arms: 8 %).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

from moebench.analysis import statistics as st

MAX_EXACT_PAIRS = 14
"""Up to here all sign patterns are enumerated."""
NUM_RANDOM_FLIPS = 20_000
MAX_EFFECT = 1e6
"""Limit of the search for the ends of an interval."""
Values = st.Values


@dataclass(frozen=True, kw_only=True)
class ScaledPairs:
    """The paired differences of one arm in one experiment."""

    difference_S: Values
    """Positive where the arm is better."""
    scale: float
    """The unit: the experiment's pooled SD of paired differences."""
    other_square_sum: float = 0.0
    """Sum of squares of the differences of the experiment's other arms."""
    num_others: int = 0
    """Number of these differences."""

    @property
    def effect_S(self) -> Values:
        """Differences in the unit."""
        return self.difference_S / self.scale


def compute_effect(pairs: Sequence[ScaledPairs]) -> float:
    """Return the mean effect over all pairs, in SDs of the paired difference."""
    return float(np.concatenate([each.effect_S for each in pairs]).mean())


def make_flips(num_pairs: int) -> Values:
    """Return the sign patterns, [patterns, pairs], the first without a flip; random ones where there are too many."""
    if num_pairs <= MAX_EXACT_PAIRS:
        bits = (np.arange(2**num_pairs)[:, None] >> np.arange(num_pairs)) & 1
        return np.asarray(1 - 2 * bits, dtype=np.float64)
    flips = np.random.default_rng(0).choice([-1.0, 1.0], (NUM_RANDOM_FLIPS, num_pairs))
    flips[0] = 1.0
    return flips


def sign_flip_p(pairs: Sequence[ScaledPairs], effect: float = 0.0, flips: Values | None = None) -> float:
    """Return the two-sided p of the hypothesis that the arm has this effect in every experiment."""
    weighted = []
    for each in pairs:
        shifted_S = each.difference_S - effect * each.scale
        square_sum = each.other_square_sum + float((shifted_S**2).sum())
        mean_square = square_sum / (each.num_others + shifted_S.size)
        weighted.append(shifted_S / sqrt(mean_square) if mean_square > 0 else shifted_S)
    x_N = np.concatenate(weighted)
    flip_FN = make_flips(x_N.size) if flips is None else flips
    sum_F = np.abs(flip_FN @ x_N)
    return float((sum_F >= sum_F[0] * (1 - 1e-12) - 1e-12).mean())


def invert_test(pairs: Sequence[ScaledPairs]) -> st.Interval | None:
    """Return the effects that the test does not reject at 5 %; None with fewer than 6 pairs, where it rejects none."""
    num_pairs = sum(each.difference_S.size for each in pairs)
    if num_pairs < st.EXACT_SEEDS:
        return None
    flips, center = make_flips(num_pairs), compute_effect(pairs)
    low, high = (_find_end(pairs, center, direction, flips) for direction in (-1.0, 1.0))
    return None if low is None or high is None else (low, high)


def _find_end(pairs: Sequence[ScaledPairs], center: float, direction: float, flips: Values) -> float | None:
    """Return the effect beyond which the test rejects; None if it never does."""
    inside, step = 0.0, 0.25
    while sign_flip_p(pairs, center + direction * step, flips) > st.ALPHA:
        inside, step = step, 2 * step
        if step > MAX_EFFECT:
            return None
    for _ in range(20):
        middle = (inside + step) / 2
        if sign_flip_p(pairs, center + direction * middle, flips) > st.ALPHA:
            inside = middle
        else:
            step = middle
    return center + direction * step
