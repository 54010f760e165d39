"""Least-squares fit of the bilinear law, by variable projection: linear in a, b, c, d for each E_start and E_max."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from moebench.analysis.scaling.law import BilinearLaw, Values, saturate_experts

Form = Literal["saturating", "start", "plain"]
"""saturating: all six coefficients; start: E_max infinite; plain: Ê = E."""
Indices = NDArray[np.int64]
NUM_COEFFICIENTS: dict[Form, int] = {"saturating": 6, "start": 5, "plain": 4}
MIN_EXPERT_COUNTS: dict[Form, int] = {"saturating": 5, "start": 4, "plain": 3}
"""Different numbers of experts, with the dense model's 1, that leave a form one degree of freedom at each size."""
LOW = (-1.0, 0.05)
"""Lower bounds of log10 of E_start and of E_max / E_start."""
HIGH = (2.0, 6.0)
"""Their upper bounds: an E_max a million times E_start means no saturation."""
STARTS = tuple((start, ratio) for start in (0.0, 0.5, 1.0) for ratio in (1.0, 2.0, 4.0))
"""Initial values of the two, from each of which a fit starts; the best result counts."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Points:
    """Final losses of M runs."""

    num_params_M: Values
    """Parameters that compute one token."""
    num_experts_M: Values
    """1 for a dense model."""
    loss_M: Values
    """In any unit: another one changes d alone."""
    size_M: Values
    """Equal for runs of one model size: with experts, they may differ in a few parameters."""

    def __len__(self) -> int:
        return len(self.loss_M)

    def select(self, index_M: Indices) -> "Points":
        """Return the runs with these indices."""
        return Points(
            num_params_M=self.num_params_M[index_M],
            num_experts_M=self.num_experts_M[index_M],
            loss_M=self.loss_M[index_M],
            size_M=self.size_M[index_M],
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Fit:
    """A fitted law and what it leaves."""

    law: BilinearLaw
    form: Form
    residual_M: Values
    """log10 of the losses minus the law."""

    @property
    def rms(self) -> float:
        """Root mean square of the residuals, in decades."""
        return float(np.sqrt(np.mean(self.residual_M**2)))


def choose_form(points: Points) -> Form | None:
    """Return the richest form that the numbers of experts allow; None for less than three different ones."""
    num_counts = len(np.unique(points.num_experts_M))
    return next((form for form, least in MIN_EXPERT_COUNTS.items() if num_counts >= least), None)


def fit_law(points: Points, form: Form, starts: Sequence[Sequence[float]] = STARTS) -> Fit:
    """Return the law of least squares in log10 of the loss.

    `starts`: initial log10 of E_start and of E_max / E_start. With both given, the other coefficients are a linear fit.
    """
    log_n_M, log_loss_M = np.log10(points.num_params_M), np.log10(points.loss_M)
    num_shape = NUM_COEFFICIENTS[form] - 4

    def compute_residuals(shape: Values) -> Values:
        return solve(shape)[1]

    def solve(shape: Values) -> tuple[Values, Values]:
        log_e_M = np.log10(saturate_experts(points.num_experts_M, *_read_shape(shape)))
        columns = np.stack([log_n_M, log_e_M, log_n_M * log_e_M, np.ones_like(log_e_M)], axis=1)
        coefficients = np.linalg.lstsq(columns, log_loss_M, rcond=None)[0]
        return coefficients, log_loss_M - columns @ coefficients

    shape = np.zeros(0)
    if num_shape:
        bounds = np.array(LOW[:num_shape]), np.array(HIGH[:num_shape])
        shapes = dict.fromkeys(tuple(start[:num_shape]) for start in starts)
        solutions = [
            least_squares(compute_residuals, np.clip(start, *bounds), bounds=bounds, xtol=1e-6, ftol=1e-8)
            for start in shapes
        ]
        shape = min(solutions, key=lambda solution: float(solution.cost)).x
    (a, b, c, d), residual_M = solve(shape)
    e_start, e_max = _read_shape(shape)
    law = BilinearLaw(a=float(a), b=float(b), c=float(c), d=float(d), e_start=e_start, e_max=e_max)
    return Fit(law=law, form=form, residual_M=residual_M)


def read_start(law: BilinearLaw) -> tuple[float, float]:
    """Return the initial values at which a fit begins with the shape of a law."""
    ratio = law.e_max / law.e_start
    return float(np.log10(law.e_start)), float(np.log10(ratio)) if np.isfinite(ratio) else HIGH[1]


def _read_shape(shape: Values) -> tuple[float, float]:
    """Return E_start and E_max."""
    e_start = float(10 ** shape[0]) if len(shape) > 0 else 1.0
    return e_start, float(e_start * 10 ** shape[1]) if len(shape) > 1 else float("inf")
