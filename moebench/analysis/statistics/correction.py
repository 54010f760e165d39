"""The correction of a family of p values."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from moebench.analysis.statistics.seed_values import Values


def holm(p_values: ArrayLike) -> Values:
    """Return the p values of families (last axis), corrected by Holm: the chance of any false claim is at most alpha.

    As statsmodels' `multipletests`, which collects garbage in every call: 0.3 s where torch is loaded.
    """
    p_A = np.asarray(p_values, dtype=np.float64)
    if p_A.size == 0:
        return p_A
    order_A = np.argsort(p_A, axis=-1, kind="stable")
    stepwise_A = np.take_along_axis(p_A, order_A, -1) * np.arange(p_A.shape[-1], 0, -1)
    corrected_A = np.empty_like(p_A)
    np.put_along_axis(corrected_A, order_A, np.minimum(np.maximum.accumulate(stepwise_A, axis=-1), 1.0), -1)
    return corrected_A


def correct_family(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return the p values of one family, by name, corrected by Holm."""
    return dict(zip(p_values, map(float, holm(list(p_values.values()))), strict=True))
