"""Effective compute on planted data: factors worked by hand, noise-free recovery, coverage of the intervals."""

import numpy as np
import pytest

from moebench.analysis.pooled.effective_compute import SizePairs, count_decades, estimate_effective_compute
from moebench.analysis.pooled.scaling_curve import fit_scaling_curves, solve_shift
from moebench.errors import UsageError

DECADES = np.array([13.0, 14.0, 15.0])


def log_loss(x, offset=1.8):
    """Return ln L of a curve over log10 C: offset + exp(1.2) * 10^(-0.15 (x - 13))."""
    return np.log(offset + np.exp(1.2) * 10 ** (-0.15 * (x - 13)))


def plant(rng, shift_R, x_R=DECADES, num_seeds=3, sd=0.005, speed=0.8, offset=1.8):
    """Return sizes at which an arm is the baseline with 10^shift times its compute; half the noise is common."""
    pairs = []
    for x, shift in zip(x_R, np.broadcast_to(shift_R, x_R.shape), strict=True):
        seed_S = rng.normal(0, sd / np.sqrt(2), num_seeds)
        ours_S, theirs_S = seed_S + rng.normal(0, sd / np.sqrt(2), (2, num_seeds))
        pairs.append(
            SizePairs(
                size=f"{x:g}",
                baseline_flops=10**x,
                arm_flops=10**x,
                log_loss_S=log_loss(x + shift, offset) + ours_S,
                baseline_log_loss_S=log_loss(x, offset) + theirs_S,
                log_speed_S=np.log(speed) + rng.normal(0, 4 * sd, num_seeds),
            )
        )
    return pairs


def test_a_power_law_by_hand():
    # L = 100, 10, 1 at 1, 2, 3: slope -ln 10 per decade, no offset; an arm at 10 needs one decade more to reach 1.
    curve = fit_scaling_curves(np.array([1.0, 2.0, 3.0]), np.log([[100.0, 10.0, 1.0]]))
    assert curve.offset_B[0] == 0
    assert curve.slope_B[0] == pytest.approx(-np.log(10))
    assert curve.log_loss(np.array([[4.0]]))[0, 0] == pytest.approx(np.log(0.1))
    shift = solve_shift(curve, np.array([2.0]), np.log([[1.0]]), np.ones((1, 1)))
    assert shift == pytest.approx([1.0], abs=1e-6)


def test_an_offset_is_recovered():
    curve = fit_scaling_curves(DECADES, log_loss(DECADES)[None, :])
    assert curve.offset_B[0] * np.exp(curve.log_scale_B[0]) == pytest.approx(1.8, rel=0.02)
    assert curve.log_loss(np.array([[14.5]]))[0, 0] == pytest.approx(log_loss(14.5), abs=3e-4)


@pytest.mark.parametrize("factor", [0.5, 0.93, 1.0, 1.07, 3.0])
def test_without_noise_the_factor_is_recovered(factor):
    pairs = plant(np.random.default_rng(0), np.log10(factor), sd=0.0)
    estimate = estimate_effective_compute(pairs, 20)
    assert estimate.compute.value == pytest.approx(factor, rel=0.01)
    assert estimate.wall_clock.value == pytest.approx(0.8 * factor, rel=0.01)
    assert list(estimate.by_size.values()) == pytest.approx([factor] * 3, rel=0.02)


def test_measured_compute_of_the_arm_counts():
    # The arm reaches the baseline's quality with 20 % more compute at each size: it is worth 1 / 1.2.
    pairs = plant(np.random.default_rng(0), 0.0, sd=0.0)
    costly = [
        SizePairs(
            size=p.size,
            baseline_flops=p.baseline_flops,
            arm_flops=1.2 * p.arm_flops,
            log_loss_S=p.log_loss_S,
            baseline_log_loss_S=p.baseline_log_loss_S,
        )
        for p in pairs
    ]
    estimate = estimate_effective_compute(costly, 20)
    assert estimate.compute.value == pytest.approx(1 / 1.2, rel=1e-3)
    assert estimate.wall_clock is None
    assert count_decades([size.baseline_flops for size in costly]) == pytest.approx(2)


def test_one_seed_gives_no_interval():
    estimate = estimate_effective_compute(plant(np.random.default_rng(0), 0.1, num_seeds=1), 20)
    assert (estimate.compute.interval, estimate.compute.p) == (None, None)
    assert not estimate.is_offset_identified


def test_a_baseline_that_gets_worse_is_refused():
    pairs = plant(np.random.default_rng(0), 0.0, x_R=DECADES[::-1], sd=0.0)
    turned = [
        SizePairs(
            size=p.size,
            baseline_flops=q.baseline_flops,
            arm_flops=q.arm_flops,
            log_loss_S=p.log_loss_S,
            baseline_log_loss_S=p.baseline_log_loss_S,
        )
        for p, q in zip(pairs, pairs[::-1], strict=True)
    ]
    with pytest.raises(UsageError, match="does not get better with compute"):
        estimate_effective_compute(turned, 20)


def count_covered(shift, spread=0.0, repeats=60, **keys):
    """Return the shares of repeats whose intervals of compute and of wall clock cover the planted factors."""
    rng = np.random.default_rng(0)
    covered = np.zeros(2)
    for _ in range(repeats):
        shift_R = shift + rng.normal(0, spread, len(keys.get("x_R", DECADES)))
        estimate = estimate_effective_compute(plant(rng, shift_R, **keys), 200)
        for index, (factor, truth) in enumerate(((estimate.compute, 1.0), (estimate.wall_clock, 0.8))):
            low, high = factor.interval
            covered[index] += low <= 10**shift * truth <= high
    return covered / repeats


def test_intervals_cover_the_planted_factor():
    assert (count_covered(0.03) >= 0.9).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_sizes", "num_seeds", "shift"), [(3, 3, 0.03), (3, 5, -0.1), (4, 3, 0.3), (4, 5, 0.03), (6, 3, -0.1)]
)
def test_intervals_cover_in_all_designs(num_sizes, num_seeds, shift):
    x_R = np.linspace(13, 15, num_sizes)
    assert (count_covered(shift, repeats=200, x_R=x_R, num_seeds=num_seeds) >= 0.92).all()


@pytest.mark.slow
def test_intervals_are_too_narrow_where_the_factor_changes_with_the_size():
    """As docs/comparing.md says: 12 % of spread between 4 sizes."""
    covered = count_covered(0.1, spread=0.05, repeats=200, x_R=np.linspace(13, 15, 4))
    assert (covered >= 0.85).all()
    assert (covered <= 0.95).all()
