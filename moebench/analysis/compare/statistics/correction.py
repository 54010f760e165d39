"""The correction of a family of p values."""

from collections.abc import Sequence

from statsmodels.stats.multitest import multipletests

from moebench.analysis.compare.statistics.levels import ALPHA


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Return the p values of a family, corrected by Holm: the chance of any false claim is at most 5 %."""
    if not p_values:
        return ()
    return tuple(float(p) for p in multipletests(p_values, alpha=ALPHA, method="holm")[1])
