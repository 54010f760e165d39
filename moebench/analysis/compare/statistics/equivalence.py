"""Equivalence: two one-sided tests (TOST) whether a difference is smaller than a margin."""

from math import sqrt

from scipy import stats

from moebench.analysis.compare.statistics.levels import EQUIVALENCE_SEEDS


def equivalence_p(mean: float, sd: float, num_seeds: int, margin: float) -> float | None:
    """Return p of the paired TOST: small where the true difference lies within ± `margin`.

    The larger p of two one-sided paired t-tests (Schuirmann, J. Pharmacokinet. Biopharm. 15, 1987), from the mean and
    the SD of the differences. None below five seeds. Without a spread, arms that are equal in every seed have p 0 and
    others none.
    """
    if num_seeds < EQUIVALENCE_SEEDS:
        return None
    if sd == 0:
        return 0.0 if mean == 0 and margin > 0 else None
    return float(stats.t.sf((margin - abs(mean)) / (sd / sqrt(num_seeds)), num_seeds - 1))
