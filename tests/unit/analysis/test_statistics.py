"""Numbers of the statistics, worked by hand or against a simulation."""

from math import inf, nan, sqrt

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_paired

from moebench.analysis import statistics as st


def test_mean_interval_by_hand():
    # x = [1, 2, 3]: mean 2, SD 1, t(.975, 2) = 4.302653 -> half = 4.302653 / sqrt(3) = 2.484138
    assert st.mean_interval([1, 2, 3]) == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-6)


def test_paired_difference_by_hand():
    # a - b = [-1, -2, -3]: mean -2, SD 1, t = -2 / (1 / sqrt 3) = -3.4641, two-sided p with 2 df = 0.074180
    result = st.compute_paired_difference([9, 8, 7], [10, 10, 10])
    assert result.mean == -2
    assert result.sd == pytest.approx(1)
    assert result.p == pytest.approx(0.074180, abs=1e-6)
    assert result.interval == pytest.approx((-2 - 2.484138, -2 + 2.484138), abs=1e-6)
    assert result.p_exact is None  # three seeds


def test_pairing_removes_what_the_seeds_share():
    # The seeds move both arms by tens; the differences are -1.1, -0.9, -1.0 all the same: mean -1, SD 0.1.
    result = st.compute_paired_difference([18.9, 29.1, 39.0], [20, 30, 40])
    assert result.mean == pytest.approx(-1)
    assert result.p is not None
    assert result.p < 0.01
    # pooled SD: both near 10 -> the effect is a tenth of what a seed does; correlation 1 -> 2 degrees of freedom, for
    # which Hedges' factor is gamma(1) / gamma(1/2) = 0.5642
    assert result.effect_sd == pytest.approx(-0.1 * 0.5642, abs=2e-3)


def test_exact_sign_flip_by_hand():
    # Six differences of one sign: 2 of the 2**6 = 64 sign patterns are as extreme -> 2 / 64 = 0.03125.
    assert st.sign_flip_p([1, 2, 3, 4, 5, 7]) == pytest.approx(2 / 64)
    # One small difference against: patterns with |sum| >= 20: all +, only 1 flipped, and mirrors -> 4 / 64.
    assert st.sign_flip_p([-1, 2, 3, 4, 5, 7]) == pytest.approx(4 / 64)
    assert st.sign_flip_p([1, 2, 3, 4, 5]) is None  # the floor 2 / 32 = .0625 shows nothing
    assert st.sign_flip_p(np.arange(1.0, 18.0)) is None


def test_holm_by_hand():
    # sorted .01 .02 .04 -> 3 * .01, 2 * .02, 1 * .04, each at least the one before
    assert st.holm([0.04, 0.01, 0.02]) == pytest.approx((0.04, 0.03, 0.04))
    assert st.holm([]).size == 0


def test_holm_as_statsmodels_has_it():
    p_RA = np.random.default_rng(0).beta(0.3, 1, (3, 7))  # statsmodels collects garbage each time
    corrected_RA = [multipletests(p_A, method="holm")[1] for p_A in p_RA]
    np.testing.assert_allclose(st.holm(p_RA), corrected_RA)


def test_equivalence_as_statsmodels_has_it():
    for a_S, b_S in np.random.default_rng(0).normal(0, 1, (10, 2, 6)):
        pair = st.compute_paired_difference(a_S, b_S)
        wanted = ttost_paired(a_S, b_S, -1.5, 1.5)[0]
        assert st.equivalence_p(pair.mean, pair.spread, 6, 1.5) == pytest.approx(wanted)
    spread = st.SpreadEstimate(sd=1, df=3)
    assert st.equivalence_p(0, spread, 4, 9) is None  # too few seeds
    flat = st.SpreadEstimate(sd=0, df=4)
    assert [st.equivalence_p(mean, flat, 5, 1) for mean in (0, 0.5)] == [0, None]


def test_table_spread_by_hand():
    # SDs 1, 1 and 10, of which the third counts as 3 times the median, 1: mean variance (1 + 1 + 9) / 3.
    value_AS = np.array([[1, -1, 0, 0], [0, 0, 1, -1], [10, 10, -10, -10]]) / np.sqrt([[2 / 3], [2 / 3], [4 / 3]])
    spread = st.table_spread(value_AS, [0] * 4)
    assert spread.sd**2 == pytest.approx(11 / 3)
    assert st.spread_p(1.0, st.SpreadEstimate(sd=2.0, df=8), 4) == pytest.approx(2 * stats.t.sf(1, 8))


def test_effect_in_seed_sd_by_hand():
    # a = [1, 2, 3] SD 1; b = [2, 5, 8] SD 3; pooled sqrt((1 + 9) / 2) = 2.236068; mean difference -3
    # Hedges' factor: covariance 3, df = 2 (1 + 9)^2 / (1 + 81 + 2 * 9) = 2 -> 0.56419
    effect = st.effect_in_seed_sd([1, 2, 3], [2, 5, 8])
    assert effect.value == pytest.approx(-3 / sqrt(5) * 0.56419, rel=1e-4)
    # Differences -1, -3, -5: SD 2, t = -3 / (2 / sqrt 3) = -2.5981 with 2 df. The non-centralities of which it is the
    # 97.5 % and the 2.5 % quantile, times (2 / sqrt 3) / sqrt 5, are the bounds.
    low, high = (bound * sqrt(15) / 2 for bound in effect.interval)
    assert stats.nct.cdf(-2.5981, 2, low) == pytest.approx(0.975, abs=1e-4)
    assert stats.nct.cdf(-2.5981, 2, high) == pytest.approx(0.025, abs=1e-4)


def test_hedges_factor_of_unrelated_samples():
    # SD 1 and 1, covariance 0: df = 2 · 3 = 6, factor gamma(3) / (gamma(2.5) sqrt 3) = 2 / (1.32934 * 1.73205) = 0.8686
    assert st.effect_in_seed_sd([1, -1, 1, -1], [1, 1, -1, -1]).value == 0
    effect = st.effect_in_seed_sd([3, 1, 3, 1], [1, 1, -1, -1])
    assert effect.value == pytest.approx(2 / sqrt(4 / 3) * 0.8686, rel=1e-4)


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_below_three_seeds_only_describes(num_seeds):
    result = st.compute_paired_difference([1.0, 1.5][:num_seeds], [2.0, 2.1][:num_seeds])
    assert result.mean < 0
    assert (result.interval, result.p, result.p_exact, result.effect_sd, result.sd) == (None,) * 5
    assert st.mean_interval([1.0, 1.5][:num_seeds]) is None


def test_copies_are_certainly_not_different():
    result = st.compute_paired_difference([1.8, 1.9, 1.7], [1.8, 1.9, 1.7])
    assert (result.mean, result.interval, result.p, result.effect_sd) == (0, (0, 0), 1, 0)
    six = st.compute_paired_difference([1.8] * 6, [1.8] * 6)
    assert (six.p, six.p_exact, six.effect_sd) == (1, 1, 0)
    assert st.mean_interval([1.8, 1.8, 1.8]) == (1.8, 1.8)


def test_differences_that_are_equal_for_all_seeds_have_no_p_value():
    # 0.1 + 0.2 style rounding must not be taken for a spread: t would be 1e15 and p 0.
    result = st.compute_paired_difference([1.5 + 0.1, 2.5 + 0.1, 3.6 + 0.1], [1.5, 2.5, 3.6])
    assert result.mean == pytest.approx(0.1)
    assert (result.interval, result.p) == (None, None)
    flat = st.compute_paired_difference([1.0] * 4, [2.0] * 4)
    assert (flat.mean, flat.p, flat.effect_sd) == (-1, None, None)
    assert st.smallest_detectable(flat.sd, 4, 1) is None


@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_values_that_are_not_finite_are_an_error(bad):
    with pytest.raises(ValueError, match="finite values"):
        st.compute_paired_difference([1, 2, bad], [1, 2, 3])
    with pytest.raises(ValueError, match="finite values"):
        st.mean_interval([1, bad, 3])
    with pytest.raises(ValueError, match="finite values"):
        st.sign_flip_p([bad] * 6)


def test_shapes_that_are_not_pairs_are_an_error():
    with pytest.raises(ValueError, match="given 2 and 3"):
        st.compute_paired_difference([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="shape"):
        st.mean_interval([])


def test_smallest_detectable_against_tables():
    # Paired t at alpha .05, power .8 (G*Power, Cohen's dz): n = 8 -> 1.1560, n = 16 -> 0.7495.
    assert st.smallest_detectable(1.0, 8, 1) == pytest.approx(1.1560, abs=1e-3)
    assert st.smallest_detectable(0.01, 16, 1) == pytest.approx(0.007495, abs=1e-5)
    assert st.smallest_detectable(1.0, 2, 1) is None
    assert st.smallest_detectable(None, 8, 1) is None


@pytest.mark.parametrize(("num_seeds", "num_comparisons"), [(3, 5), (3, 20), (4, 20), (5, 60)])
def test_smallest_detectable_where_library_routines_give_nan(num_seeds, num_comparisons):
    effect = st.smallest_detectable(1.0, num_seeds, num_comparisons)
    assert effect is not None
    x_RS = np.random.default_rng(0).normal(effect, 1, (100_000, num_seeds))
    t_R = x_RS.mean(axis=1) / x_RS.std(axis=1, ddof=1) * sqrt(num_seeds)
    critical = stats.t.isf(0.025 / num_comparisons, num_seeds - 1)
    assert np.mean(np.abs(t_R) > critical) == pytest.approx(0.8, abs=0.005)


def test_power_of_no_effect_is_alpha():
    assert st.t_power(0, 5, 0.01) == pytest.approx(0.01, abs=1e-5)


def test_pooled_spread_by_hand():
    # Differences of two arms: [-1, 0, 1] and [1, 0, -1] around their means. Their mean over arms is [0, 0, 0]: shared
    # variance 0. Residual: 2 + 2 over 2 arms of 2 degrees of freedom -> 1, the mean of the two variances, with 2 df.
    result = st.estimate_pooled_spread([[1, 2, 3], [8, 7, 6]], [0, 0, 0])
    assert (result.sd, result.df) == pytest.approx((1, 2))
    # One arm alone: its own SD, n - 1 degrees of freedom.
    assert st.estimate_pooled_spread([[9, 8, 7]], [10, 10, 10]) == st.SpreadEstimate(sd=1, df=2)
    # The third moves as the mean of both does, [0, 0, 0]: the mean of the variances 1, 1 and 0 -> 2 / 3.
    # Shared: 0. Residual 4 over 3 · 2; df = (2/3)² / ((2/3)² / 4) = 4.
    result = st.estimate_pooled_spread([[1, 2, 3], [8, 7, 6], [5, 5, 5]], [0, 0, 0])
    assert (result.sd**2, result.df) == pytest.approx((2 / 3, 4))
    # Both move alike: [-1, 0, 1] is shared, variance 1, residual 0: two arms know no more than one, 2 df.
    result = st.estimate_pooled_spread([[1, 2, 3], [2, 3, 4]], [0, 0, 0])
    assert (result.sd, result.df) == pytest.approx((1, 2))
    assert st.estimate_pooled_spread([[1, 1, 1], [2, 2, 2]], [0, 0, 0]) is None


def test_pooled_spread_is_the_mean_of_the_variances():
    rng = np.random.default_rng(0)
    arm_AS, baseline_S = rng.normal(0, [[1], [2], [3], [4]], (4, 6)), rng.normal(0, 1, 6)
    variances = [st.compute_paired_difference(arm_S, baseline_S).sd ** 2 for arm_S in arm_AS]
    assert st.estimate_pooled_spread(arm_AS, baseline_S).sd ** 2 == pytest.approx(np.mean(variances))


@pytest.mark.parametrize(("num_seeds", "df", "num_comparisons"), [(3, 2, 1), (5, 4, 1), (3, 5, 5), (8, 17.5, 5)])
def test_smallest_detectable_makes_up_for_an_estimated_sd(num_seeds, df, num_comparisons):
    # True SD 1: the one sample gives the SD that is printed, another one is tested.
    effect = st.smallest_detectable(1.0, num_seeds, num_comparisons, df)
    assert effect > st.smallest_detectable(1.0, num_seeds, num_comparisons)
    rng = np.random.default_rng(0)
    estimate_R = np.sqrt(rng.chisquare(df, 200_000) / df)
    x_RS = rng.normal(0, 1, (200_000, num_seeds)) + (estimate_R * effect)[:, None]
    t_R = x_RS.mean(axis=1) / x_RS.std(axis=1, ddof=1) * sqrt(num_seeds)
    critical = stats.t.isf(0.025 / num_comparisons, num_seeds - 1)
    assert np.mean(np.abs(t_R) > critical) == pytest.approx(0.8, abs=0.005)
