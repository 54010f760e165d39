"""The bilinear scaling law of routed models (Clark et al. 2022, arXiv:2202.01169, eq. 1, 7 and 8).

log10 L(N, E) = a log10 N + b log10 Ê + c log10 N log10 Ê + d,   1/Ê = 1/(E - 1 + (1/E_start - 1/E_max)⁻¹) + 1/E_max

N: parameters that compute one token; E: experts; Ê: experts with saturation, E_start for a dense model (E = 1) and
E_max for infinitely many.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Values = NDArray[np.float64]
MAX_EXPONENT = 300.0
"""Powers of ten beyond this are as good as infinite, and nearly more than a float holds."""


@dataclass(frozen=True, kw_only=True)
class BilinearLaw:
    """The law with its coefficients; logarithms are decimal."""

    a: float
    """Exponent of N for a model with Ê = 1."""
    b: float
    """Exponent of Ê at N = 1."""
    c: float
    """Change of the exponent of N per decade of Ê: above 0 where experts help large models less."""
    d: float
    """log10 of the loss at N = 1 and Ê = 1."""
    e_start: float = 1.0
    """Ê of a dense model."""
    e_max: float = math.inf
    """Ê of infinitely many experts."""

    def predict_log_loss(self, num_params: ArrayLike, num_experts: ArrayLike) -> Values:
        """Return log10 of the loss."""
        log_n, log_e = np.log10(np.asarray(num_params, float)), np.log10(self.saturate(num_experts))
        return np.asarray(self.a * log_n + self.b * log_e + self.c * log_n * log_e + self.d)

    def saturate(self, num_experts: ArrayLike) -> Values:
        """Return Ê for E experts."""
        return saturate_experts(num_experts, self.e_start, self.e_max)

    def effective_params(self, num_params: ArrayLike, num_experts: ArrayLike) -> Values:
        """Return the parameters of the dense model with the same loss (eq. 11)."""
        log_n, log_e = np.log10(np.asarray(num_params, float)), np.log10(self.saturate(num_experts))
        log_start = math.log10(self.e_start)
        numerator = log_n * (self.a + self.c * log_e) + self.b * (log_e - log_start)
        slope = self.a + self.c * log_start
        if slope == 0:  # no dense model is better than another
            return np.full_like(numerator, math.nan)
        return np.asarray(10 ** np.clip(numerator / slope, -MAX_EXPONENT, MAX_EXPONENT))

    @property
    def cutoff_params(self) -> float:
        """Parameters above which more experts raise the loss, 10^(-b/c); infinite where they never do (c <= 0)."""
        if self.c <= 0:
            return math.inf
        exponent = -self.b / self.c
        return 10.0**exponent if exponent < MAX_EXPONENT else math.inf


def saturate_experts(num_experts: ArrayLike, e_start: float, e_max: float) -> Values:
    """Return Ê for E experts: E_start at E = 1, and below E_max."""
    shift = 1 / (1 / e_start - 1 / e_max)
    return 1 / (1 / (np.asarray(num_experts, float) - 1 + shift) + 1 / e_max)
