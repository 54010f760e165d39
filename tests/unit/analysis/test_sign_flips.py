"""The sign-flip test over experiments and its interval: numbers by hand, scipy, simulations."""

import numpy as np
import pytest
from scipy import stats

from moebench.analysis.pooled.sign_flips import ScaledPairs, compute_effect, invert_test, make_flips, sign_flip_p


def scaled(values, scale=1.0, **others):
    return ScaledPairs(difference_S=np.array(values, dtype=np.float64), scale=scale, **others)


def test_p_by_hand():
    # All 6 of one sign: only that pattern and its mirror image are as extreme, 2 of 64.
    assert sign_flip_p([scaled([1, 2, 3]), scaled([2, 1, 4], scale=5.0)]) == 2 / 64
    assert sign_flip_p([scaled([1, -1])]) == 1
    assert sign_flip_p([scaled([0, 0, 0])]) == 1


def test_p_is_that_of_scipy():
    rng = np.random.default_rng(0)
    pairs = [scaled(rng.normal(0.5, 1, 4)), scaled(rng.normal(5, 10, 5))]
    weighted = np.concatenate([each.difference_S / np.sqrt((each.difference_S**2).mean()) for each in pairs])
    test = stats.permutation_test((weighted,), np.sum, permutation_type="samples", n_resamples=2**9)
    assert sign_flip_p(pairs) == pytest.approx(test.pvalue)


def test_the_unit_of_an_experiment_changes_nothing():
    pairs = [scaled([1, 2, -0.5]), scaled([2, 1, 4])]
    assert sign_flip_p(pairs) == sign_flip_p([scaled([1000, 2000, -500], scale=1000), pairs[1]])
    assert compute_effect([scaled([10, 20], scale=10)]) == 1.5


def test_the_interval_holds_what_the_test_does_not_reject():
    pairs = [scaled([1, 2, 3]), scaled([2.5, 1.5, 4])]
    low, high = invert_test(pairs)
    assert sign_flip_p(pairs, low + 1e-3) > 0.05 >= sign_flip_p(pairs, low - 1e-3)
    assert sign_flip_p(pairs, high - 1e-3) > 0.05 >= sign_flip_p(pairs, high + 1e-3)
    assert low > 0
    assert invert_test([scaled([1, 2, 3, 4, 5])]) is None  # the smallest p of 5 pairs is 0.0625


def test_many_pairs_draw_patterns():
    assert make_flips(5).shape == (32, 5)
    flips = make_flips(40)
    assert flips.shape == (20_000, 40)
    assert (flips[0] == 1).all()


def draw(rng, num_tasks, num_seeds, num_arms, effect=0.0):
    """Draw experiments of different scales whose arms share the baseline; return the pairs of the first arm."""
    pairs = []
    for _ in range(num_tasks):
        difference_AS = rng.normal(0, 1, (num_arms, num_seeds)) - rng.normal(0, 1, num_seeds)
        difference_AS = np.exp(rng.normal()) * (difference_AS / np.sqrt(2) + effect)
        scale = float(difference_AS.std(axis=1, ddof=1).mean())
        others = difference_AS[1:]
        pairs.append(scaled(difference_AS[0], scale, other_square_sum=float((others**2).sum()), num_others=others.size))
    return pairs


@pytest.mark.parametrize(("num_tasks", "num_seeds", "num_arms"), [(4, 3, 1), (4, 3, 5), (2, 5, 5)])
def test_equal_arms_are_rejected_in_five_percent(num_tasks, num_seeds, num_arms):
    rng = np.random.default_rng(num_tasks + num_arms)
    p_values = np.array([sign_flip_p(draw(rng, num_tasks, num_seeds, num_arms)) for _ in range(600)])
    assert (p_values <= 0.05).mean() <= 0.075  # 5 % and 2.8 standard errors


def test_intervals_cover_no_effect():
    rng = np.random.default_rng(7)
    bounds = np.array([invert_test(draw(rng, 4, 3, 5)) for _ in range(150)])
    assert np.mean((bounds[:, 0] <= 0) & (bounds[:, 1] >= 0)) >= 0.9


def test_pooling_shows_what_single_tasks_do_not():
    rng = np.random.default_rng(3)
    draws = [draw(rng, 4, 3, 5, effect=1.0) for _ in range(150)]
    pooled = np.mean([sign_flip_p(pairs) <= 0.05 for pairs in draws])
    single = np.mean([stats.ttest_1samp(pairs[0].difference_S, 0).pvalue <= 0.05 for pairs in draws])
    assert pooled >= 0.7
    assert single <= 0.35
