"""Bootstrap intervals of the bilinear law: sizes are drawn, and in each size its runs.

Runs of one size share a deviation from the law (its learning rate, its batch), so runs alone would give intervals of a
and d that are too narrow. Simulated coverage of the 95 % intervals: docs/scaling.md.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from moebench.analysis.scaling.fit import MIN_EXPERT_COUNTS, Fit, Form, Indices, Points, fit_law, read_start
from moebench.analysis.scaling.law import BilinearLaw, Values

NAMES = ("a", "b", "c", "d", "e_start", "e_max")
LEVEL = 0.95
DECADE = 10.0
WEAK = math.sqrt(DECADE)
SECOND_START = (0.5, 4.0)
"""Replicates start at the fitted shape and at this one."""
Identification = Literal["identified", "weakly identified", "not identified", "fixed"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One coefficient."""

    name: str
    value: float
    low: float
    high: float
    """Ends of the 95 % interval; the value where the form fixes it."""
    identification: Identification

    def contains(self, value: float) -> bool:
        """Return whether the interval contains a value."""
        return self.low <= value <= self.high


@dataclass(frozen=True, kw_only=True, eq=False)
class Bootstrap:
    """A fit and those of resampled runs."""

    fit: Fit
    laws: tuple[BilinearLaw, ...]

    def estimate(self, name: str) -> Estimate:
        """Return a coefficient with its interval."""
        value = float(getattr(self.fit.law, name))
        if name in _list_fixed_coefficients(self.fit.form):
            return Estimate(name=name, value=value, low=value, high=value, identification="fixed")
        low, high = interval(np.array([getattr(law, name) for law in self.laws]))
        return Estimate(name=name, value=value, low=low, high=high, identification=identify(name, low, high))

    @property
    def estimates(self) -> tuple[Estimate, ...]:
        """All coefficients."""
        return tuple(self.estimate(name) for name in NAMES)

    def effective_params(self, num_params: float, num_experts: float) -> tuple[float, float, float]:
        """Return the parameters of the dense model of equal loss, and the ends of their interval."""
        values = np.array([float(law.effective_params(num_params, num_experts)) for law in self.laws])
        return float(self.fit.law.effective_params(num_params, num_experts)), *interval(values)


def bootstrap_law(points: Points, form: Form, num_replicates: int = 1000, seed: int = 0) -> Bootstrap:
    """Fit the law, and again to `num_replicates` resamples."""
    fit = fit_law(points, form)
    starts = (read_start(fit.law), SECOND_START)
    replicates = _resample(points, MIN_EXPERT_COUNTS[form], np.random.default_rng(seed))
    laws = tuple(fit_law(points.select(next(replicates)), form, starts).law for _ in range(num_replicates))
    return Bootstrap(fit=fit, laws=laws)


def _resample(points: Points, min_expert_counts: int, generator: np.random.Generator) -> Iterator[Indices]:
    """Yield indices of runs: sizes with replacement, then runs of each; never too few sizes or numbers of experts."""
    sizes = np.unique(points.size_M)
    runs = [np.flatnonzero(points.size_M == size) for size in sizes]
    while True:
        drawn = generator.integers(len(sizes), size=len(sizes))
        index = np.concatenate([generator.choice(runs[size], len(runs[size])) for size in drawn])
        num_counts = len(np.unique(points.num_experts_M[index]))
        if len(np.unique(drawn)) >= 2 and num_counts >= min_expert_counts:
            yield index


def interval(values: Values) -> tuple[float, float]:
    """Return the central 95 % of values."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def identify(name: str, low: float, high: float) -> Identification:
    """Return how well an interval determines a coefficient: more than a decade wide is not at all.

    d is a logarithm already. An interval that contains 0 spans any number of decades.
    """
    if name == "d":
        ratio = 10 ** (high - low)
    else:
        ratio = max(abs(low), abs(high)) / min(abs(low), abs(high)) if low * high > 0 else math.inf
    return "not identified" if ratio > DECADE else "weakly identified" if ratio > WEAK else "identified"


def _list_fixed_coefficients(form: Form) -> tuple[str, ...]:
    return {"saturating": (), "start": ("e_max",), "plain": ("e_start", "e_max")}[form]
