"""The baseline's quality as a function of compute: a power law with an offset, fitted by variable projection.

L(C) = E + A (C / C0)^-alpha, C0 the geometric mean of the sizes. For each E of a grid the rest is a straight line in
logarithms, fitted in closed form; the E with the smallest squared error of ln L is taken (variable projection, Golub
and Pereyra 1973). All functions take a batch of curves: suffixes _B batch, _G grid of offsets, _R sizes ("rungs").
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
OFFSET_SHARES: Values = 1 - np.geomspace(1.0, 0.02, 48)
"""Grid of offsets as shares of the smallest loss: 0 to 0.98."""


@dataclass(frozen=True)
class ScalingCurve:
    """A batch of curves of ln L over x = log10 C."""

    offset_B: Values
    """E, as a share of the smallest loss that was fitted: 0 for a pure power law."""
    log_scale_B: Values
    """ln of the smallest loss."""
    intercept_B: Values
    """ln(L / smallest loss - E) at `center`."""
    slope_B: Values
    """Slope of ln(L / smallest loss - E) per decade; negative where more compute helps."""
    center: float

    def log_loss(self, x_BR: Values) -> Values:
        """Return ln L at log10 C."""
        power_BR = np.exp(self.intercept_B[:, None] + self.slope_B[:, None] * (x_BR - self.center))
        return np.asarray(self.log_scale_B[:, None] + np.log(self.offset_B[:, None] + power_BR))


def fit_scaling_curves(x_R: Values, log_loss_BR: Values) -> ScalingCurve:
    """Fit a curve to each row of ln L at the same x = log10 C; two sizes give a pure power law."""
    log_scale_B = log_loss_BR.min(1)
    loss_BR = np.exp(log_loss_BR - log_scale_B[:, None])
    offset_G = OFFSET_SHARES if len(x_R) > 2 else np.zeros(1)
    z_BGR = np.log(loss_BR[:, None, :] - offset_G[:, None])
    center = float(x_R.mean())
    slope_BG = (z_BGR * (x_R - center)).sum(-1) / ((x_R - center) ** 2).sum()
    intercept_BG = z_BGR.mean(-1)
    fitted_BGR = np.exp(intercept_BG[..., None] + slope_BG[..., None] * (x_R - center)) + offset_G[:, None]
    error_BG = ((np.log(fitted_BGR) - np.log(loss_BR)[:, None, :]) ** 2).sum(-1)
    best_B, row_B = error_BG.argmin(1), np.arange(len(loss_BR))
    return ScalingCurve(
        offset_B=offset_G[best_B],
        log_scale_B=log_scale_B,
        intercept_B=intercept_BG[row_B, best_B],
        slope_B=slope_BG[row_B, best_B],
        center=center,
    )


def solve_shift(curve: ScalingCurve, x_R: Values, target_BR: Values, weight_BR: Values) -> Values:
    """Return for each curve the shift s in decades with sum of weight (target - ln L(x + s)) = 0.

    Bisection between -`MAX_SHIFT` and `MAX_SHIFT`; a target below the offset gives the upper end.
    """
    low_B, high_B = np.full(len(target_BR), -MAX_SHIFT), np.full(len(target_BR), MAX_SHIFT)
    for _ in range(NUM_BISECTIONS):
        middle_B = (low_B + high_B) / 2
        excess_B = (weight_BR * (target_BR - curve.log_loss(x_R[None, :] + middle_B[:, None]))).sum(1)
        needs_less = excess_B > 0  # the arm is worse than the curve there
        high_B, low_B = np.where(needs_less, middle_B, high_B), np.where(needs_less, low_B, middle_B)
    return np.asarray((low_B + high_B) / 2, dtype=np.float64)


MAX_SHIFT = 4.0
"""Decades."""
NUM_BISECTIONS = 40
