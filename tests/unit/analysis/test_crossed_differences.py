"""Differences over seeds and items: numbers by hand, and the coverage of the intervals."""

import math

import numpy as np
import pytest
from scipy import stats

from moebench.analysis.statistics import compute_crossed_difference


def test_by_hand() -> None:
    """Three seeds, two items: means of seeds 1, 2, 6, means of items 4, 2.

    MS seeds = 2 (4 + 1 + 9) / 2 = 14; MS items = 3 (1 + 1) / 1 = 6; the residuals are ±1, 0, ∓1 around the sums of
    both effects: MS residual = 4 / 2 = 2. Variance of the mean: (14 + 6 - 2) / 6 = 3, with
    18² / (14² / 2 + 6² / 1 + 2² / 2) = 324 / 136 degrees of freedom.
    """
    difference = compute_crossed_difference([[3, -1], [3, 1], [6, 6]])
    assert difference.mean == 3
    assert difference.standard_error == pytest.approx(math.sqrt(3))
    assert difference.df == pytest.approx(324 / 136)
    assert difference.p == pytest.approx(2 * stats.t.sf(3 / math.sqrt(3), 324 / 136))
    half = stats.t.isf(0.025, 324 / 136) * math.sqrt(3)
    assert difference.interval == pytest.approx((3 - half, 3 + half))


def test_without_enough_seeds_or_spread_there_is_no_test() -> None:
    assert compute_crossed_difference([[1.0, 2.0], [2.0, 3.0]]).interval is None
    assert compute_crossed_difference([[1.0]] * 4).p is None
    same = compute_crossed_difference(np.zeros((3, 5)))
    assert (same.interval, same.p) == ((0.0, 0.0), 1.0)
    constant = compute_crossed_difference(np.ones((3, 5)))
    assert (constant.mean, constant.interval, constant.p) == (1.0, None, None)
    for wrong in ([1.0, 2.0], [[math.nan, 1.0]], np.zeros((0, 3))):
        with pytest.raises(ValueError, match="finite differences of seeds by items"):
            compute_crossed_difference(wrong)


def test_weights_are_those_of_a_ratio_of_sums() -> None:
    """Differences in proportion to the weights have no noise: each unit differs by the same amount."""
    weight_I = np.array([0.5, 1.0, 1.5])
    exact = compute_crossed_difference(np.tile(2 * weight_I, (3, 1)), weight_I)
    assert (exact.mean, exact.standard_error) == (2.0, 0.0)
    assert compute_crossed_difference(np.tile(2 * weight_I, (3, 1))).standard_error > 0


def draw_differences(
    rng: np.random.Generator, shape: tuple[int, int], spread: tuple[float, float], kind: str
) -> np.ndarray:
    """Draw differences whose true mean is 0: SDs of seeds and of items, and noise with SD 1 of each answer."""
    (num_seeds, num_items), (of_seeds, of_items) = shape, spread
    if kind == "normal":
        noise = rng.normal(size=shape)
        return of_seeds * rng.normal(size=(num_seeds, 1)) + of_items * rng.normal(size=(1, num_items)) + noise
    difficulty = rng.normal(size=(1, num_items))

    def draw_answers() -> np.ndarray:
        own = of_items * rng.normal(size=(1, num_items)) + of_seeds * rng.normal(size=(num_seeds, 1))
        return (difficulty + own + rng.normal(size=shape) > 0).astype(float)

    return draw_answers() - draw_answers()


SPREADS = ((0, 0), (0, 1), (0.1, 0), (0.1, 1), (0.3, 0.3), (0.05, 0.5))


def measure_coverage(
    shape: tuple[int, int], spread: tuple[float, float], kind: str, repeats: int
) -> tuple[float, float]:
    """Return how often the interval covers the true mean, and how often one over seeds alone does."""
    rng = np.random.default_rng(0)
    covered = covered_by_seeds = 0
    for _ in range(repeats):
        difference_SI = draw_differences(rng, shape, spread, kind)
        interval = compute_crossed_difference(difference_SI).interval
        covered += interval is None or interval[0] <= 0 <= interval[1]
        means_S = difference_SI.mean(1)
        half = stats.t.isf(0.025, len(means_S) - 1) * means_S.std(ddof=1) / math.sqrt(len(means_S))
        covered_by_seeds += abs(means_S.mean()) <= half
    return covered / repeats, covered_by_seeds / repeats


@pytest.mark.parametrize(("num_seeds", "kind"), [(3, "normal"), (5, "answers")])
def test_intervals_cover_other_seeds_and_other_items(num_seeds: int, kind: str) -> None:
    coverages = [measure_coverage((num_seeds, 100), spread, kind, 300) for spread in SPREADS]
    assert all(0.91 <= covered <= 1 for covered, _ in coverages)
    # An interval over seeds alone says nothing about other items.
    by_seeds = min(covered for _, covered in coverages)
    assert by_seeds < 0.88


@pytest.mark.parametrize(("num_seeds", "num_items"), [(10, 2), (5, 3), (20, 5)])
def test_intervals_cover_with_fewer_items_than_seeds(num_seeds: int, num_items: int) -> None:
    """Where items make the difference vary, their number determines the degrees of freedom."""
    covered, _ = measure_coverage((num_seeds, num_items), (0, 10), "normal", 400)
    assert 0.92 <= covered <= 0.99


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["normal", "answers"])
@pytest.mark.parametrize("num_items", [30, 100, 700])
@pytest.mark.parametrize("num_seeds", [3, 5, 8])
def test_intervals_cover_in_all_designs(num_seeds: int, num_items: int, kind: str) -> None:
    for spread in SPREADS:
        covered, _ = measure_coverage((num_seeds, num_items), spread, kind, 1000)  # standard error 0.008
        assert 0.905 <= covered <= 0.998, (spread, covered)
