"""One value per seed: checks, and whether values vary at all. The suffix _S is the axis of the seeds."""

from math import isfinite

import numpy as np
from numpy.typing import ArrayLike, NDArray

Interval = tuple[float, float]
Values = NDArray[np.float64]


def as_values(values_S: ArrayLike) -> Values:
    """Return the values as an array of one axis; raise ValueError where one is not finite, or none is given."""
    x_S = np.asarray(values_S, dtype=np.float64)
    if x_S.ndim != 1 or x_S.size == 0:
        raise ValueError(f"one value per seed is needed, given an array of shape {x_S.shape}")
    if not np.isfinite(x_S).all():
        bad = [float(x) for x in x_S if not isfinite(x)]
        raise ValueError(f"a mean over seeds needs finite values: {bad[0]} among {x_S.size}")
    return x_S


def is_constant(x_S: Values, scale: float) -> bool:
    """Return whether the values are equal up to the rounding of numbers of this scale."""
    return bool(np.ptp(x_S) <= 64 * np.finfo(np.float64).eps * scale)


def compute_variance(x_S: Values) -> float:
    """Return the variance of a sample; 0 where its values are equal up to rounding."""
    return 0.0 if is_constant(x_S, float(np.abs(x_S).max())) else float(x_S.var(ddof=1))
