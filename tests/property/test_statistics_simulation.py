"""What the statistics promise, simulated: few false claims when all arms are equal, intervals that cover."""

import numpy as np
import pytest

from moebench.analysis import statistics as st


@pytest.mark.parametrize("num_seeds", [3, 5])
def test_equal_arms_are_rarely_told_apart(num_seeds):
    # Six arms without any true difference; the seed moves all of them alike (correlation 0.67).
    rng = np.random.default_rng(num_seeds)
    false_claims = 0
    for _ in range(300):
        value_AS = rng.normal(0, np.sqrt(2), num_seeds) + rng.normal(0, 1, (6, num_seeds))
        p_values = [st.paired_difference(value_S, value_AS[0]).p for value_S in value_AS[1:]]
        # Holm rejects anything at all exactly when the smallest p passes its first step.
        false_claims += min(p for p in p_values if p is not None) * len(p_values) <= st.ALPHA
    assert false_claims / 300 <= 0.08


@pytest.mark.parametrize("num_seeds", [3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("heavy_tails", [False, True])
def test_intervals_cover_the_truth(num_seeds, heavy_tails):
    rng = np.random.default_rng(num_seeds)
    shape = (1000, num_seeds)
    value_RS = 1.8 + (rng.standard_t(3, shape) if heavy_tails else rng.normal(0, 1, shape))
    bounds = np.array([st.mean_interval(value_S) for value_S in value_RS])
    assert np.mean((bounds[:, 0] <= 1.8) & (bounds[:, 1] >= 1.8)) >= 0.92


def test_difference_intervals_cover_the_truth():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        seed_S = rng.normal(0, 2, 4)
        found = st.paired_difference(seed_S + rng.normal(-0.5, 1, 4), seed_S + rng.normal(0, 1, 4))
        assert found.interval is not None
        covered += found.interval[0] <= -0.5 <= found.interval[1]
    assert covered / 400 >= 0.92
