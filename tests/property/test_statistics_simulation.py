"""What the statistics guarantee, and what they do not (docs/statistics.md), in simulations.

Intervals of means, the detectable difference, seeds that are looked at or lost; test_verdict_calibration.py and
test_interval_calibration.py have more.
"""

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from support.verdict_simulation import claim_differences

from moebench.analysis import statistics as st
from moebench.analysis.compare.comparison import Comparison, compare
from moebench.runs.result import Fault, RunResult

Array = NDArray[np.float64]


@pytest.mark.parametrize("num_seeds", [3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("heavy_tails", [False, True])
def test_intervals_cover_the_truth(num_seeds, heavy_tails):
    rng = np.random.default_rng(num_seeds)
    shape = (1000, num_seeds)
    value_RS = 1.8 + (rng.standard_t(3, shape) if heavy_tails else rng.normal(0, 1, shape))
    bounds = np.array([st.mean_interval(value_S) for value_S in value_RS])
    assert np.mean((bounds[:, 0] <= 1.8) & (bounds[:, 1] >= 1.8)) >= 0.92


def draw_arms(rng: np.random.Generator, num_repeats: int, num_seeds: int, *, paired_baseline: bool) -> Array:
    """Draw 6 equal arms, the first of them the baseline; SD 1, correlation 0.63 over seeds among those paired."""
    seed_R1S = rng.normal(0, np.sqrt(0.63), (num_repeats, 1, num_seeds))
    value_RAS = seed_R1S + rng.normal(0, np.sqrt(0.37), (num_repeats, 6, num_seeds))
    if not paired_baseline:
        value_RAS[:, 0] = rng.normal(0, 1, (num_repeats, num_seeds))
    return value_RAS


def detectable_sds(df_R: Array, num_seeds: int, num_comparisons: int) -> Array:
    """Return `smallest_detectable` of an SD of 1 for many degrees of freedom, between those of a grid."""
    df_Q = np.geomspace(df_R.min(), df_R.max() + 0.1, 12)
    sds_Q = [st.smallest_detectable(1.0, num_seeds, num_comparisons, float(df)) for df in df_Q]
    return np.interp(df_R, df_Q, np.array(sds_Q, dtype=np.float64))


def power_at_the_detectable(value_RAS: Array, sd: float) -> Array:
    """Return for each repeat the true power at the difference it prints, where that of the pair has this SD."""
    num_seeds, num_comparisons = value_RAS.shape[2], value_RAS.shape[1] - 1
    result = [st.estimate_pooled_spread(value_AS[1:], value_AS[0]) for value_AS in value_RAS]
    sd_R, df_R = (np.array([getattr(spread, name) for spread in result]) for name in ("sd", "df"))
    effect_Q = np.linspace(0, 60, 400)
    power_Q = [st.t_power(effect, num_seeds, st.ALPHA / num_comparisons) for effect in effect_Q]
    return np.interp(sd_R * detectable_sds(df_R, num_seeds, num_comparisons) / sd, effect_Q, power_Q)


@pytest.mark.parametrize("paired_baseline", [True, False])
@pytest.mark.parametrize("num_seeds", [3, 5, 8])
def test_the_detectable_difference_is_shown_in_four_of_five_repeats(num_seeds, paired_baseline):
    # As sparse arms against a sparse and against a dense baseline: the one shares initial weights with them.
    value_RAS = draw_arms(np.random.default_rng(num_seeds), 3000, num_seeds, paired_baseline=paired_baseline)
    power_R = power_at_the_detectable(value_RAS, np.sqrt(2 * 0.37 if paired_baseline else 2))
    assert 0.75 <= power_R.mean() <= 0.85
    # What one experiment prints is an estimate: 9 of 10 times it has a power of ...
    low, high = np.quantile(power_R, [0.05, 0.95])
    assert low > {3: 0.25, 5: 0.28, 8: 0.35}[num_seeds]
    assert high < 1


@pytest.mark.parametrize("paired_baseline", [True, False])
@pytest.mark.parametrize("num_seeds", [3, 5, 8])
def test_the_detectable_difference_gets_a_verdict_in_four_of_five_tables(num_seeds, paired_baseline):
    # One table prints the difference, another has one arm that much better: how often is the verdict "better"? With all
    # conditions of a verdict, the noise of the table among them; test_verdict_calibration.py shows that `compare`
    # decides so.
    rng = np.random.default_rng(100 + num_seeds)
    first_RAS, second_RAS = (draw_arms(rng, 4000, num_seeds, paired_baseline=paired_baseline) for _ in range(2))
    spreads = [st.estimate_pooled_spread(value_AS[1:], value_AS[0]) for value_AS in first_RAS]
    sd_R, df_R = (np.array([getattr(spread, name) for spread in spreads]) for name in ("sd", "df"))
    second_RAS[:, 3] -= (sd_R * detectable_sds(df_R, num_seeds, 5))[:, None]
    assert 0.75 <= claim_differences(second_RAS)[:, 2].mean() <= 0.85


def test_an_arm_that_varies_more_than_the_others_is_less_often_shown():
    # The limit: 4 arms of SD 1 and one of SD 2, against a baseline of SD 1. The differences have SD 1.41, once 2.24.
    rng = np.random.default_rng(0)
    value_RAS = rng.normal(0, 1, (3000, 6, 5))
    value_RAS[:, 5] *= 2
    quiet, loud = (power_at_the_detectable(value_RAS, sd).mean() for sd in (np.sqrt(2), np.sqrt(5)))
    assert quiet == pytest.approx(0.87, abs=0.02)
    assert loud == pytest.approx(0.54, abs=0.02)


def test_compare_prints_what_was_simulated():
    value_AS = draw_arms(np.random.default_rng(0), 1, 5, paired_baseline=True)[0]
    spread = st.estimate_pooled_spread(value_AS[1:], value_AS[0])
    wanted = st.smallest_detectable(spread.sd, 5, 5, spread.df)
    result = compare_simulated(value_AS)
    assert [difference.smallest_detectable for difference in result.differences] == pytest.approx([wanted] * 5)


def run(arm: int, seed: int, value: float) -> RunResult:
    cost = {"train_flops_per_token": 1.0, "eval_flops_per_token": 1.0, "train_tokens": 1.0}
    return RunResult(
        id=f"{arm}-{seed}", arm=f"arm {arm}", seed=seed, status="done", error=None, step=1, cost=cost,
        metrics={"bits_per_byte": value}, throughput={}, data_digest="d", eval_digest="e", marks=(), config={},
    )  # fmt: skip


def compare_simulated(value_AS: Array, diverged: tuple[tuple[int, int], ...] = ()) -> Comparison:
    """Compare arms with the first; `diverged`: arm and seed of runs without a result of their own."""
    lost = {"status": "failed", "error": "loss is nan", "fault": Fault.DIVERGED, "metrics": {}}
    results = [run(arm, seed, value) for arm, value_S in enumerate(value_AS) for seed, value in enumerate(value_S)]
    results = [replace(r, **lost) if (int(r.arm[4:]), r.seed) in diverged else r for r in results]
    return compare(results, expected=[(r.arm, r.seed, r.id) for r in results], baseline="arm 0")


def test_survivors_of_an_equal_arm_never_win():
    # The 3 worst of 8 seeds diverge, of an arm that is as good as the other: in a third of repeats the 5 that are left
    # differ significantly from the baseline, by selection alone.
    value_RAS = draw_arms(np.random.default_rng(0), 2000, 8, paired_baseline=True)[:, :2]
    order_RS = np.argsort(value_RAS[:, 1] - value_RAS[:, 0], axis=1)
    kept_RS = np.take_along_axis(value_RAS[:, 1] - value_RAS[:, 0], order_RS, 1)[:, :5]
    told_apart_R = p_values(kept_RS[:, None])[:, 0] <= st.ALPHA
    assert told_apart_R.mean() > 0.25
    for repeat in np.flatnonzero(told_apart_R)[:8]:
        result = compare_simulated(value_RAS[repeat], tuple((1, int(seed)) for seed in order_RS[repeat, 5:]))
        assert result.differences[0].p <= st.ALPHA
        assert result.differences[0].verdict == "diverged"
        assert all("best" not in arm.marks for arm in result.arms)


def p_values(difference_RAS: Array) -> Array:
    """Return p of the paired t-test of each repeat and arm."""
    result: Array = stats.ttest_1samp(difference_RAS, 0, axis=2).pvalue
    return result


def test_looking_after_each_seed_makes_false_verdicts_likelier():
    value_RAS = draw_arms(np.random.default_rng(0), 6000, 20, paired_baseline=True)
    difference_RAS = value_RAS[:, 1:] - value_RAS[:, :1]
    seen_R, share = np.zeros(6000, dtype=bool), {}
    for num_seeds in range(3, 21):
        seen_R |= p_values(difference_RAS[:, :, :num_seeds]).min(1) * 5 <= st.ALPHA
        share[num_seeds] = seen_R.mean()
    assert [share[n] for n in (3, 6, 10, 20)] == pytest.approx([0.05, 0.13, 0.18, 0.25], abs=0.012)
