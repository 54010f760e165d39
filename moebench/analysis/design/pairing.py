"""What pairing seeds achieved: the variance of an unpaired difference over that of the paired one."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from moebench.analysis import statistics as st


@dataclass(frozen=True, kw_only=True)
class PairingGain:
    """Arms against a baseline over common seeds."""

    variance_ratio: float
    """(Var arm + Var baseline) / Var(arm - baseline): as many unpaired seeds are worth one pair."""
    correlation: float | None
    """Correlation of arm and baseline over seeds; None for several arms together, and for an arm that does not vary."""


def measure_pairing(pairs: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> tuple[dict[str, PairingGain], float | None]:
    """Return the gain of each arm, and the variance ratio of all of them together.

    `pairs`: arm -> its values and the baseline's, seed by seed. The ratio of all is that of the sums of variances. Arms
    with fewer than three seeds, or with the same difference for every seed, are left out; None without any.
    """
    gains, unpaired, paired = {}, 0.0, 0.0
    for arm, values in pairs.items():
        arm_S, baseline_S = (np.asarray(side, dtype=np.float64) for side in values)
        if arm_S.size < st.MIN_SEEDS:
            continue
        variances = float(arm_S.var(ddof=1)), float(baseline_S.var(ddof=1))
        of_difference = float((arm_S - baseline_S).var(ddof=1))
        if of_difference <= 1e-12 * sum(variances):  # without a spread, up to rounding
            continue
        has_spread = min(variances) > 0
        correlation = float(np.corrcoef(arm_S, baseline_S)[0, 1]) if has_spread else None
        gains[arm] = PairingGain(variance_ratio=sum(variances) / of_difference, correlation=correlation)
        unpaired, paired = unpaired + sum(variances), paired + of_difference
    return gains, unpaired / paired if paired else None
