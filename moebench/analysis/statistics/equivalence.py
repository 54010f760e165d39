"""Equivalence: two one-sided tests (TOST) whether a difference is smaller than a margin."""

from math import sqrt

from scipy import special

from moebench.analysis.statistics.levels import EQUIVALENCE_SEEDS
from moebench.analysis.statistics.power import SpreadEstimate


def equivalence_p(mean: float, spread: SpreadEstimate, num_seeds: int, margin: float) -> float | None:
    """Return p of the paired TOST: small where the true difference lies within ± `margin`.

    The larger p of two one-sided t-tests (Schuirmann, J. Pharmacokinet. Biopharm. 15, 1987, doi:10.1007/BF01068419),
    from the mean of the differences and an estimate of their SD. None below five seeds. Without a spread, arms that are
    equal in every seed have p 0 and others none.
    """
    if num_seeds < EQUIVALENCE_SEEDS:
        return None
    if spread.sd == 0:
        return 0.0 if mean == 0 and margin > 0 else None
    return float(special.stdtr(spread.df, (abs(mean) - margin) / (spread.sd / sqrt(num_seeds))))
