"""Simulated tables of a comparison, many at once: noise, the claims of `compare` as array operations, error rates.

A table is `value_AS`: the metric (lower is better) of the baseline and k arms, seed by seed; the axis R is the tables.
A decision function takes `value_RAS` and returns claims per table and arm, without the baseline. So sequential designs
can be simulated with the same noise: `measure_false_claims(decide, ...)`.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import special

from moebench.analysis import statistics as st

Array = NDArray[np.float64]
Claims = NDArray[np.bool_]
Draw = Callable[[np.random.Generator, tuple[int, int, int]], Array]
Decide = Callable[[Array], Claims]
QUIET = 0.3
"""SD of arms without bad seeds, beside skewed ones of SD 1."""


def draw_normal(rng: np.random.Generator, shape: tuple[int, int, int]) -> Array:
    """Draw independent noise."""
    return rng.normal(0, 1, shape)


def draw_paired(rng: np.random.Generator, shape: tuple[int, int, int]) -> Array:
    """Draw noise that seeds share over arms, as initial weights shared by sparse arms cause: correlation 0.63."""
    shared_R1S = rng.normal(0, np.sqrt(0.63), (shape[0], 1, shape[2]))
    return shared_R1S + rng.normal(0, np.sqrt(0.37), shape)


def draw_unpaired_baseline(rng: np.random.Generator, shape: tuple[int, int, int]) -> Array:
    """Draw noise that seeds share over arms, but not with the baseline."""
    value_RAS = draw_paired(rng, shape)
    value_RAS[:, 0] = rng.normal(0, 1, value_RAS[:, 0].shape)
    return value_RAS


def draw_unequal(rng: np.random.Generator, shape: tuple[int, int, int]) -> Array:
    """Draw noise whose SD differs between arms by up to a factor of four."""
    return rng.normal(0, 1, shape) * np.resize([1, 1, 2, 2, 4, 4], shape[1])[:, None]


def draw_heavy_tails(rng: np.random.Generator, shape: tuple[int, int, int]) -> Array:
    """Draw symmetric noise with outliers: t with 3 degrees of freedom."""
    return rng.standard_t(3, shape)


def draw_skewed(rng: np.random.Generator, shape: tuple[int, int, int]) -> Array:
    """Draw exponential noise for all arms and the baseline."""
    return rng.exponential(1, shape) - 1


def quieten_baseline(draw: Draw) -> Draw:
    """Return the noise with a baseline of normal noise and SD 0.3."""

    def draw_with_quiet_baseline(rng: np.random.Generator, shape: tuple[int, int, int]) -> Array:
        value_RAS = draw(rng, shape)
        value_RAS[:, 0] = rng.normal(0, QUIET, value_RAS[:, 0].shape)
        return value_RAS

    return draw_with_quiet_baseline


def draw_lognormal(rng: np.random.Generator, shape: tuple[int, int, int]) -> Array:
    """Draw lognormal noise of SD 1."""
    return (np.exp(rng.normal(0, 1, shape)) - np.exp(0.5)) / np.sqrt((np.e - 1) * np.e)


def draw_half_skewed(rng: np.random.Generator, shape: tuple[int, int, int]) -> Array:
    """Draw exponential noise for every second arm; the other arms are as quiet as the baseline."""
    value_RAS = rng.normal(0, QUIET, shape)
    value_RAS[:, 1::2] = rng.exponential(1, value_RAS[:, 1::2].shape) - 1
    return value_RAS


def draw_skewed_baseline(rng: np.random.Generator, shape: tuple[int, int, int]) -> Array:
    """Draw exponential noise for the baseline only."""
    value_RAS = rng.normal(0, QUIET, shape)
    value_RAS[:, 0] = rng.exponential(1, value_RAS[:, 0].shape) - 1
    return value_RAS


def spoil_seeds(share: float) -> Draw:
    """Return quiet noise in which this share of seeds is worse by 3, which is ten SDs; with mean 0."""

    def draw(rng: np.random.Generator, shape: tuple[int, int, int]) -> Array:
        return rng.normal(0, QUIET, shape) + 3 * (rng.random(shape) < share) - 3 * share

    return quieten_baseline(draw)


SYMMETRIC: dict[str, Draw] = {
    "normal": draw_normal,
    "paired": draw_paired,
    "unpaired baseline": draw_unpaired_baseline,
    "unequal": draw_unequal,
    "heavy tails": draw_heavy_tails,
}
SKEWED: dict[str, Draw] = {
    "skewed": draw_skewed,
    "skewed arms": quieten_baseline(draw_skewed),
    "lognormal arms": quieten_baseline(draw_lognormal),
    "half of the arms skewed": draw_half_skewed,
    "skewed baseline": draw_skewed_baseline,
    "1 of 10 seeds bad": spoil_seeds(0.1),
    "1 of 5 seeds bad": spoil_seeds(0.2),
}
NOISES = SYMMETRIC | SKEWED


def claim_differences(value_RAS: Array, alpha: float = st.ALPHA) -> Claims:
    """Return which arms `compare` calls better or worse."""
    claims: Claims = correct_p(value_RAS) <= alpha
    return claims


def claim_differences_by_own_noise(value_RAS: Array) -> Claims:
    """Return which arms Holm-corrected paired t-tests alone would call better or worse."""
    claims: Claims = st.holm(measure_differences(value_RAS)[1]) <= st.ALPHA
    return claims


def correct_p(value_RAS: Array) -> Array:
    """Return `p_holm` of each table and arm."""
    mean_RA, p_RA, noise_R1, df_R1 = measure_differences(value_RAS)
    pooled_RA = 2 * special.stdtr(df_R1, -np.abs(mean_RA) / noise_R1)
    return st.holm(np.maximum(p_RA, pooled_RA))


def measure_differences(value_RAS: Array) -> tuple[Array, Array, Array, Array]:
    """Return mean differences, p of the paired t-tests, and the table's standard error with its degrees of freedom."""
    difference_RAS = value_RAS[:, 1:] - value_RAS[:, :1]
    num_arms, num_seeds = difference_RAS.shape[1:]
    mean_RA, sd_RA = difference_RAS.mean(2), difference_RAS.std(2, ddof=1)
    p_RA = 2 * special.stdtr(num_seeds - 1, -np.abs(mean_RA) / sd_RA * np.sqrt(num_seeds))
    limit_R1 = st.MAX_SD_RATIO * np.sqrt(np.median(sd_RA**2, axis=1, keepdims=True))
    capped_RAS = (difference_RAS - mean_RA[..., None]) * np.minimum(1, limit_R1 / sd_RA)[..., None]
    shared_RS = capped_RAS.mean(1)
    shared_R = (shared_RS**2).sum(1) / (num_seeds - 1)
    residual_R = ((capped_RAS - shared_RS[:, None]) ** 2).sum((1, 2)) / (num_arms * (num_seeds - 1))
    df_residual = (num_arms - 1) * (num_seeds - 1)
    rest_R = residual_R**2 / df_residual if df_residual else 0.0
    df_R = (shared_R + residual_R) ** 2 / (shared_R**2 / (num_seeds - 1) + rest_R)
    return mean_RA, p_RA, np.sqrt((shared_R + residual_R) / num_seeds)[:, None], df_R[:, None]


def claim_equivalence(value_RAS: Array, margin: float) -> Claims:
    """Return which arms pass the equivalence tests, whether they are also called better or worse or not."""
    num_seeds = value_RAS.shape[2]
    mean_RA, _, noise_R1, df_R1 = measure_differences(value_RAS)
    own_RA = (value_RAS[:, 1:] - value_RAS[:, :1]).std(2, ddof=1) / np.sqrt(num_seeds)
    distance_RA = np.abs(mean_RA) - margin
    p_RA = np.maximum(special.stdtr(num_seeds - 1, distance_RA / own_RA), special.stdtr(df_R1, distance_RA / noise_R1))
    claims: Claims = st.holm(p_RA) <= st.ALPHA
    return claims


def measure_false_claims(decide: Decide, draw: Draw, num_arms: int, num_seeds: int, num_tables: int = 10_000) -> float:
    """Return the share of tables in which `decide` claims anything, although all arms are equal to the baseline."""
    rng = np.random.default_rng([num_arms, num_seeds])
    num_false, size = 0, max(1, min(num_tables, 2_000_000 // (num_arms + 1) // num_seeds))
    for start in range(0, num_tables, size):
        shape = (min(size, num_tables - start), num_arms + 1, num_seeds)
        num_false += int(decide(draw(rng, shape)).any(1).sum())
    return num_false / num_tables
