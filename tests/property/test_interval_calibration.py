"""How often the intervals of differences and of effects have the truth (docs/statistics.md), in simulations."""

import numpy as np
import pytest
from support.verdict_simulation import SKEWED, SYMMETRIC, Draw, measure_differences

from moebench.analysis import statistics as st


def measure_coverage(draw: Draw, num_arms: int, num_seeds: int) -> tuple[float, float, float]:
    """Return how often an interval has the truth, all of a table by themselves have, and all simultaneous ones have."""
    value_RAS = draw(np.random.default_rng(1), (10_000, num_arms + 1, num_seeds))
    mean_RA, _, _, _ = measure_differences(value_RAS)
    sd_RA = (value_RAS[:, 1:] - value_RAS[:, :1]).std(2, ddof=1)
    single, together = (st.t_interval(0.0, 1.0, num_seeds, number)[1] for number in (1, num_arms))
    holds_RA = np.abs(mean_RA) <= single * sd_RA
    holds_together_R = (np.abs(mean_RA) <= together * sd_RA).all(1)
    return float(holds_RA.mean()), float(holds_RA.all(1).mean()), float(holds_together_R.mean())


@pytest.mark.parametrize("name", SYMMETRIC)
def test_intervals_cover_by_themselves_and_together(name):
    for num_arms, num_seeds in ((1, 3), (5, 3), (5, 5), (5, 8), (30, 5)):
        single, _, together = measure_coverage(SYMMETRIC[name], num_arms, num_seeds)
        assert 0.94 <= single <= 0.97
        assert 0.94 <= together <= 0.98


@pytest.mark.parametrize("num_seeds", [3, 5, 8])
def test_five_intervals_by_themselves_hold_together_in_four_of_five_repeats(num_seeds):
    assert measure_coverage(SYMMETRIC["paired"], 5, num_seeds)[1] == pytest.approx(0.80, abs=0.02)


@pytest.mark.parametrize(("num_seeds", "share"), [(3, 0.74), (5, 0.84), (8, 0.89)])
def test_a_bootstrap_would_cover_less(num_seeds, share):
    rng = np.random.default_rng(0)
    value_RS = rng.normal(0, 1, (2000, num_seeds))
    resampled_RBS = np.take_along_axis(value_RS[:, None], rng.integers(num_seeds, size=(2000, 400, num_seeds)), 2)
    low_R, high_R = np.quantile(resampled_RBS.mean(2), [0.025, 0.975], axis=1)
    assert ((low_R <= 0) & (high_R >= 0)).mean() == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize(
    ("name", "single", "together"),
    [("skewed arms", (0.90, 0.92), (0.84, 0.91)), ("1 of 5 seeds bad", (0.77, 0.86), (0.54, 0.83))],
)
def test_intervals_of_arms_with_rare_bad_seeds_cover_less(name, single, together):
    coverage = [measure_coverage(SKEWED[name], 5, num_seeds) for num_seeds in (3, 5, 8)]
    assert all(single[0] <= one <= single[1] for one, _, _ in coverage)
    assert all(together[0] <= all_five <= together[1] for _, _, all_five in coverage)


@pytest.mark.parametrize("num_seeds", [3, 5, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sd", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_effect_intervals_cover_the_true_effect(num_seeds, sd):
    rng = np.random.default_rng(num_seeds)
    for effect, correlation in ((0, 0), (1, 0.63), (2, 0.9), (4, 0)):
        noise_RAS = rng.normal(0, 1, (800, 2, num_seeds))
        noise_RAS[:, 1] = sd * (correlation * noise_RAS[:, 0] + np.sqrt(1 - correlation**2) * noise_RAS[:, 1])
        noise_RAS[:, 1] += effect * np.sqrt((1 + sd**2) / 2)
        result = [st.effect_in_seed_sd(value_AS[1], value_AS[0]) for value_AS in noise_RAS]
        bounds = np.array([each.interval for each in result])
        assert np.mean((bounds[:, 0] <= effect) & (effect <= bounds[:, 1])) >= 0.925
        # Hedges' factor leaves at most a fifth of bias at 3 seeds, without it the mean is up to 1.5 of the truth.
        mean = np.mean([each.value for each in result])
        assert mean == pytest.approx(effect, abs=0.12 + effect * {3: 0.2, 5: 0.06, 8: 0.04}[num_seeds])


@pytest.mark.parametrize(
    ("num_seeds", "low", "high"),
    [(3, 0.4, 3.7), (5, 0.7, 3.5), pytest.param(8, 1.0, 3.2, marks=pytest.mark.slow)],
)
def test_how_far_an_effect_is_from_the_truth(num_seeds, low, high):
    rng = np.random.default_rng(num_seeds)
    result = [st.effect_in_seed_sd(rng.normal(2, 1, num_seeds), rng.normal(0, 1, num_seeds)) for _ in range(3000)]
    assert np.quantile([each.value for each in result], [0.05, 0.95]) == pytest.approx([low, high], abs=0.2)
