"""Effective compute: how many times more compute the baseline needs for the quality of an arm, over a ladder of sizes.

The baseline's curve over compute is fitted to the means of its seeds. An arm is one factor k for all sizes: at compute
C it performs as the baseline at k C. Pairing enters as the paired difference: what is compared with the curve is
ln L of the curve plus the mean over seeds of ln L of the arm minus ln L of the baseline. _S: axis of seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from scipy import stats

from moebench.analysis import statistics as st
from moebench.analysis.pooled.scaling_curve import MAX_SHIFT, Values, fit_scaling_curves, solve_shift
from moebench.errors import UsageError

MIN_DECADES = 1.5
MIN_SIZES = 3
NUM_RESAMPLES = 2000
OFFSET_LIMIT = 0.97
"""An offset this close to the smallest loss is the end of its grid: the data do not bound it."""
MIN_DF = 4
"""Degrees of freedom, summed over sizes, from which on there is an interval."""


@dataclass(frozen=True, kw_only=True)
class SizePairs:
    """An arm and the baseline at one size, over the seeds that both have; losses are positive, lower is better."""

    size: str
    baseline_flops: float
    """Training FLOPs of the baseline, mean over seeds."""
    arm_flops: float
    log_loss_S: Values
    """ln L of the arm."""
    baseline_log_loss_S: Values
    log_speed_S: Values | None = None
    """ln of the arm's FLOP/s over the baseline's; None where times cannot be compared."""


@dataclass(frozen=True, kw_only=True)
class Factor:
    """A multiple of the baseline's compute or wall clock, with its 95 % interval; None where seeds are too few."""

    value: float
    interval: st.Interval | None
    p: float | None
    """p value of no difference, two-sided, uncorrected."""


@dataclass(frozen=True, kw_only=True)
class EffectiveCompute:
    """What an arm is worth in compute of the baseline."""

    compute: Factor
    wall_clock: Factor | None
    """`compute` times the arm's FLOP/s over the baseline's; None where times cannot be compared."""
    by_size: dict[str, float]
    """Size -> factor of compute there alone."""
    offset: float
    """E of the curve, as a share of the smallest mean loss."""
    is_offset_identified: bool
    """Whether at least 97.5 % of the resampled curves have an offset above zero, and as many one below the limit."""


def count_decades(flops: Sequence[float]) -> float:
    """Return log10 of the largest over the smallest compute."""
    return float(np.log10(max(flops) / min(flops)))


def estimate_effective_compute(pairs: Sequence[SizePairs], num_resamples: int = NUM_RESAMPLES) -> EffectiveCompute:
    """Estimate the factor of an arm; raise UsageError where the sizes do not allow it.

    The standard error is the larger of two bootstraps: over seeds within each size, and over sizes. Both are corrected
    for the narrowness of resampling n values, sqrt(n / (n - 1)) (Hesterberg, arXiv:1411.5279, section 3.2); the
    interval is a t interval with the degrees of freedom of the seeds.
    """
    x_R = np.log10([size.baseline_flops for size in pairs])
    arm_x_R = np.log10([size.arm_flops for size in pairs])
    base_R = np.array([size.baseline_log_loss_S.mean() for size in pairs])
    delta_R = np.array([(size.log_loss_S - size.baseline_log_loss_S).mean() for size in pairs])
    curve = fit_scaling_curves(x_R, base_R[None, :])
    if not curve.slope_B[0] < 0:
        raise UsageError("effective compute: the baseline does not get better with compute on these sizes")
    rng, ones = np.random.default_rng(0), np.ones((num_resamples, len(pairs)))

    def solve(log_loss_BR: Values, delta_BR: Values, weight_BR: Values) -> Values:
        curves = fit_scaling_curves(x_R, log_loss_BR)
        return solve_shift(curves, arm_x_R, curves.log_loss(x_R[None, :]) + delta_BR, weight_BR)

    [shift] = solve(base_R[None, :], delta_R[None, :], ones[:1])
    by_size = [solve(base_R[None, :], delta_R[None, :], row[None, :])[0] for row in np.eye(len(pairs))]
    base_BR, delta_BR, speed_BR = _resample_seeds(pairs, num_resamples, rng)
    over_seeds_B = solve(base_BR, delta_BR, ones)
    weight_BR = rng.multinomial(len(pairs), np.full(len(pairs), 1 / len(pairs)), num_resamples).astype(np.float64)
    all_base_BR, all_delta_BR = (np.broadcast_to(values_R, ones.shape) for values_R in (base_R, delta_R))
    over_sizes_B = solve(all_base_BR, all_delta_BR, weight_BR)
    df = sum(size.log_loss_S.size - 1 for size in pairs)
    has_interval = df >= MIN_DF and all(size.log_loss_S.size > 1 for size in pairs)
    offset_B = fit_scaling_curves(x_R, base_BR).offset_B
    wall_clock = None
    if speed_BR is not None:
        speed_R = np.array([size.log_speed_S.mean() for size in pairs if size.log_speed_S is not None])
        wall_clock = _make_factor(
            shift + speed_R.mean() / np.log(10),
            over_seeds_B + speed_BR.mean(1) / np.log(10),
            over_sizes_B + (weight_BR * speed_R).sum(1) / len(pairs) / np.log(10),
            len(pairs),
            df if has_interval else 0,
        )
    return EffectiveCompute(
        compute=_make_factor(shift, over_seeds_B, over_sizes_B, len(pairs), df if has_interval else 0),
        wall_clock=wall_clock,
        by_size={size.size: float(10**value) for size, value in zip(pairs, by_size, strict=True)},
        offset=float(curve.offset_B[0]),
        is_offset_identified=has_interval
        and bool(np.mean(offset_B > 0) >= 0.975 and np.mean(offset_B < OFFSET_LIMIT) >= 0.975),
    )


def _resample_seeds(
    pairs: Sequence[SizePairs], num_resamples: int, rng: np.random.Generator
) -> tuple[Values, Values, Values | None]:
    """Return means over resampled seeds of ln L of the baseline, of the paired difference, and of the speed."""
    columns: list[tuple[Values, ...]] = []
    has_speed = all(size.log_speed_S is not None for size in pairs)
    for size in pairs:
        n = size.log_loss_S.size
        index_BS = rng.integers(0, n, (num_resamples, n))
        values = [size.baseline_log_loss_S, size.log_loss_S - size.baseline_log_loss_S]
        values += [size.log_speed_S] if has_speed and size.log_speed_S is not None else []
        widening = sqrt(n / (n - 1)) if n > 1 else 1.0
        columns.append(tuple(v.mean() + widening * (v[index_BS].mean(1) - v.mean()) for v in values))
    stacked = [np.stack(rows, axis=1) for rows in zip(*columns, strict=True)]
    return stacked[0], stacked[1], stacked[2] if has_speed else None


def _make_factor(shift: float, over_seeds_B: Values, over_sizes_B: Values, num_sizes: int, df: int) -> Factor:
    """Return the factor of a shift in decades; without degrees of freedom there is no interval."""
    if df == 0 or abs(shift) >= MAX_SHIFT - 1e-6:
        return Factor(value=float(10**shift), interval=None, p=None)
    se = max(float(over_seeds_B.std(ddof=1)), float(over_sizes_B.std(ddof=1)) * sqrt(num_sizes / (num_sizes - 1)))
    half = float(stats.t.isf((1 - st.CONFIDENCE) / 2, df)) * se
    p = float(2 * stats.t.sf(abs(shift) / se, df)) if se > 0 else float(shift == 0)
    return Factor(value=float(10**shift), interval=(float(10 ** (shift - half)), float(10 ** (shift + half))), p=p)
