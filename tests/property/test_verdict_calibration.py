"""How often verdicts and warnings are wrong (docs/statistics.md), in simulations.

The tables have 1 to 30 arms and 3 to 8 seeds, with noise of twelve kinds. `make test` runs a part of the designs.
"""

import numpy as np
import pytest
from scipy import stats
from support.comparison_runs import make_result
from support.verdict_simulation import (
    NOISES,
    SKEWED,
    SYMMETRIC,
    Array,
    Claims,
    Draw,
    claim_differences,
    claim_differences_by_own_noise,
    claim_equivalence,
    correct_p,
    measure_differences,
    measure_false_claims,
)

from moebench.analysis import statistics as st
from moebench.analysis.compare.comparison import compare
from moebench.analysis.compare.legend import describe_limit
from moebench.analysis.compare.values import BITS_PER_BYTE, Comparison, ComparisonMetric

ARMS, SEEDS = (1, 2, 3, 5, 10, 30), (3, 4, 5, 6, 8)
LIMITS: dict[tuple[str, int], float] = {
    # Rare bad seeds of the baseline, or of a single arm, which no other arm shows; see docs/statistics.md.
    **{("skewed baseline", num_arms): 0.085 for num_arms in ARMS},
    **{(name, 2): 0.085 for name in SKEWED},
    **{(name, 1): 0.24 for name in SKEWED},
    ("skewed baseline", 1): 0.24,
}
"""Noise and number of arms whose share of tables with a false verdict may be more than 6 %."""
EQUIVALENCE_LIMITS = {
    **{(name, num_arms): 0.12 for name in SKEWED for num_arms in ARMS},
    **{(name, 1): 0.30 for name in SKEWED},
}


def compare_tables(value_AS: Array, metric: ComparisonMetric = BITS_PER_BYTE) -> Comparison:
    results = [
        make_result(f"arm {arm}", seed, value) for arm, row in enumerate(value_AS) for seed, value in enumerate(row)
    ]
    return compare(results, expected=[(r.arm, r.seed, r.id) for r in results], baseline="arm 0", metric=metric)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if turn % 4 == 0 else pytest.mark.slow) for turn, name in enumerate(NOISES)]
)
def test_the_simulation_decides_as_compare_does(name):
    # Effects of 0 to 6 SDs, so that all verdicts occur; the mean of the baseline is 100, and the margin 2.
    metric = ComparisonMetric(name="bits_per_byte", lower_is_better=True, margin=0.02)
    rng = np.random.default_rng(0)
    for num_arms, num_seeds in ((1, 5), (3, 4), (5, 8)):
        value_RAS = NOISES[name](rng, (4, num_arms + 1, num_seeds))
        value_RAS += rng.choice([0, 1, 2, 6], (4, num_arms + 1, 1))
        differs_RA, p_RA = claim_differences(value_RAS), correct_p(value_RAS)
        for table, value_AS in enumerate(value_RAS):
            value_AS += 100 - value_AS[0].mean()
            comparison = compare_tables(value_AS, metric)
            margin = comparison.margin_value
            is_equivalent_A = claim_equivalence(value_AS[None], margin)[0] & (num_seeds >= st.EQUIVALENCE_SEEDS)
            assert margin == pytest.approx(2)
            assert [pair.p_holm for pair in comparison.differences] == pytest.approx(p_RA[table])
            for pair, differs, is_equivalent in zip(
                comparison.differences, differs_RA[table], is_equivalent_A, strict=True
            ):
                assert (pair.verdict in ("better", "worse")) == differs
                assert pair.is_within_margin == is_equivalent
                assert (pair.verdict == "equivalent") == (is_equivalent and not differs)


@pytest.mark.parametrize("name", NOISES)
def test_equal_arms_rarely_get_a_verdict(name):
    for num_arms, num_seeds in ((1, 5), (2, 3), (5, 5), (10, 8)):
        share = measure_false_claims(claim_differences, NOISES[name], num_arms, num_seeds, 4000)
        assert share <= LIMITS.get((name, num_arms), 0.06)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NOISES)
def test_equal_arms_rarely_get_a_verdict_in_all_designs(name):
    for num_arms in ARMS:
        for num_seeds in SEEDS:
            share = measure_false_claims(claim_differences, NOISES[name], num_arms, num_seeds)
            assert share <= LIMITS.get((name, num_arms), 0.06), (num_arms, num_seeds)


def shift(draw: Draw, delta: float) -> Draw:
    """Return the noise around arms that differ from the baseline by `delta`."""

    def draw_shifted(rng: np.random.Generator, shape: tuple[int, int, int]) -> Array:
        value_RAS = draw(rng, shape)
        value_RAS[:, 1:] += delta
        return value_RAS

    return draw_shifted


def measure_false_equivalence(name: str, num_arms: int, num_seeds: int, num_tables: int) -> float:
    """Return the larger share of tables with a false equivalence, of arms that lie just at the upper or lower margin.

    The margin is 3 SDs: with smaller ones equivalence is claimed less often, rightly or not.
    """

    def claim(value_RAS: Array) -> Claims:
        return claim_equivalence(value_RAS, 3.0)

    shifts = (shift(NOISES[name], delta) for delta in (-3.0, 3.0))
    return max(measure_false_claims(claim, draw, num_arms, num_seeds, num_tables) for draw in shifts)


@pytest.mark.parametrize("name", NOISES)
def test_arms_at_the_margin_are_rarely_called_equivalent(name):
    for num_arms, num_seeds in ((1, 5), (5, 5), (5, 8)):
        share = measure_false_equivalence(name, num_arms, num_seeds, 4000)
        assert share <= EQUIVALENCE_LIMITS.get((name, num_arms), 0.06)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NOISES)
def test_arms_at_the_margin_are_rarely_called_equivalent_in_all_designs(name):
    for num_arms in ARMS:
        for num_seeds in (5, 6, 8):
            share = measure_false_equivalence(name, num_arms, num_seeds, 10_000)
            # 5.0 % exactly for one arm with normal noise, of which 10,000 tables show 4.4 to 5.6 %
            assert share <= EQUIVALENCE_LIMITS.get((name, num_arms), 0.056), (num_arms, num_seeds)


@pytest.mark.parametrize(("num_arms", "shares"), [(1, (0.71, 0.84, 0.96)), (5, (0.28, 0.50, 0.86))])
def test_power_to_show_equality(num_arms, shares):
    # Equal arms, paired; the margin is 1.46 SDs of the paired difference, which was 1 % of the quickstart's mean.
    for num_seeds, share in zip((5, 6, 8), shares, strict=True):
        value_RAS = NOISES["paired"](np.random.default_rng(num_seeds), (4000, num_arms + 1, num_seeds))
        assert claim_equivalence(value_RAS, 1.46 * np.sqrt(2 * 0.37)).mean() == pytest.approx(share, abs=0.03)


def test_without_correction_one_table_in_five_has_a_false_verdict():
    def claim(value_RAS: Array) -> Claims:
        claims: Claims = measure_differences(value_RAS)[1] <= st.ALPHA
        return claims

    shares = [measure_false_claims(claim, SYMMETRIC["paired"], 5, num_seeds) for num_seeds in (3, 5, 8)]
    assert shares == pytest.approx([0.2] * 3, abs=0.02)


@pytest.mark.parametrize(("num_seeds", "own", "both"), [(3, 0.09, 0.01), (5, 0.14, 0.015), (8, 0.16, 0.015)])
def test_the_noise_of_the_table_stops_verdicts_from_lucky_seeds(num_seeds, own, both):
    # 5 arms with exponential noise, none better than a quiet baseline: what the t-tests alone would claim.
    draw = SKEWED["skewed arms"]
    assert measure_false_claims(claim_differences_by_own_noise, draw, 5, num_seeds) == pytest.approx(own, abs=0.015)
    assert measure_false_claims(claim_differences, draw, 5, num_seeds) == pytest.approx(both, abs=0.006)


def find_effect_shown(claim: object, value_RAS: Array) -> float:
    """Return the effect on the first arm, in SDs of its difference, that four of five tables show."""
    assert callable(claim)
    sd = (value_RAS[:, 1] - value_RAS[:, 0]).std()
    effects = np.linspace(1.2, 4.5, 23)
    shown = [claim(value_RAS - effect * sd * np.eye(value_RAS.shape[1])[1][:, None])[:, 0].mean() for effect in effects]
    return float(np.interp(0.8, shown, effects))


@pytest.mark.parametrize(("num_arms", "ratio", "factor"), [(2, 1, 1.02), (5, 1, 1.0), (5, 10, 1.08), (3, 10, 1.45)])
def test_what_the_noise_of_the_table_costs(num_arms, ratio, factor):
    # Nothing where arms vary alike; one arm that is ten times as noisy makes others harder to tell apart.
    value_RAS = NOISES["paired"](np.random.default_rng(1), (3000, num_arms + 1, 5))
    value_RAS[:, -1] *= ratio
    own, both = (find_effect_shown(claim, value_RAS) for claim in (claim_differences_by_own_noise, claim_differences))
    assert both / own == pytest.approx(factor, abs=0.03)


@pytest.mark.parametrize(
    ("name", "num_seeds", "own", "both"),
    [("paired", 3, 0.49, 0.42), ("paired", 5, 1.66, 1.59), ("paired", 8, 2.42, 2.36), ("unequal", 5, 1.66, 1.39)],
)
def test_correct_verdicts_with_and_without_the_noise_of_the_table(name, num_seeds, own, both):
    # Five arms, true differences of normal size with an SD of 2 SDs of the paired difference, one in five of them none.
    rng = np.random.default_rng(num_seeds)
    value_RAS = SYMMETRIC[name](rng, (8000, 6, num_seeds))
    sd_A = (value_RAS[:, 1:] - value_RAS[:, :1]).std((0, 2))
    effect_RA = rng.normal(0, 2, (8000, 5)) * (rng.random((8000, 5)) > 0.2) * sd_A
    value_RAS[:, 1:] += effect_RA[..., None]
    has_right_sign_RA = measure_differences(value_RAS)[0] * effect_RA > 0
    correct = [
        (claim(value_RAS) & has_right_sign_RA).sum(1).mean()
        for claim in (claim_differences_by_own_noise, claim_differences)
    ]
    assert correct == pytest.approx([own, both], abs=0.04)


def measure_alarms(draw: Draw, num_arms: int, num_seeds: int) -> float:
    value_RAS = draw(np.random.default_rng(2), (6000, num_arms + 1, num_seeds))
    return float((st.skewness_p(value_RAS) <= st.ALPHA).mean())


@pytest.mark.parametrize(
    "name",
    [
        "normal",
        "unequal",
        pytest.param("paired", marks=pytest.mark.slow),
        pytest.param("unpaired baseline", marks=pytest.mark.slow),
    ],
)
def test_normal_noise_rarely_looks_skewed(name):
    for num_arms in (1, 5, 30):
        for num_seeds in (3, 5, 8):
            assert measure_alarms(SYMMETRIC[name], num_arms, num_seeds) <= 0.07


def test_heavy_tails_look_skewed_more_often():
    alarms = [measure_alarms(SYMMETRIC["heavy tails"], 5, num_seeds) for num_seeds in (3, 5, 8)]
    assert alarms == pytest.approx([0.05, 0.08, 0.13], abs=0.015)


@pytest.mark.parametrize(("num_arms", "shares"), [(1, (0.07, 0.13, 0.25)), (5, (0.20, 0.56, 0.88)), (30, (0.69, 1, 1))])
def test_how_often_rare_bad_seeds_are_noticed(num_arms, shares):
    alarms = [measure_alarms(SKEWED["skewed arms"], num_arms, num_seeds) for num_seeds in (3, 5, 8)]
    assert alarms == pytest.approx(shares, abs=0.02)


def test_the_normal_approximation_of_skewness():
    # One arm of 20 seeds: scipy's test (D'Agostino, n >= 8) agrees.
    x_S = np.random.default_rng(0).exponential(1, 20)
    assert st.skewness_p(x_S[None]) == pytest.approx(stats.skewtest(x_S, alternative="greater").pvalue, abs=0.01)


@pytest.mark.parametrize("num_seeds", [3, 5, 8])
def test_a_table_of_equal_arms_ends_undecided_or_equivalent(num_seeds):
    num_decided, kinds = 0, set()
    for value_AS in NOISES["paired"](np.random.default_rng(num_seeds), (20, 4, num_seeds)):
        verdicts = [pair.verdict for pair in compare_tables(100 + value_AS).differences]
        num_decided += any(verdict in ("better", "worse") for verdict in verdicts)
        kinds |= set(verdicts)
    assert num_decided <= 1
    assert "undecided" in kinds
    assert ("equivalent" in kinds) == (num_seeds >= st.EQUIVALENCE_SEEDS)  # the margin, 1, is 1.2 SDs


def test_the_limits_stand_in_the_table():
    for num_arms, text in ((1, "9 to 23 %"), (2, "up to 8 %"), (5, "up to 8 %")):
        assert text in describe_limit(num_arms)
