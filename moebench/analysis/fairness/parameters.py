"""Equal parameters: an arm against the baseline's router at the arm's number of parameters, where that was trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import log
from statistics import fmean

from moebench.analysis.fairness.run_curve import TOLERANCE
from moebench.runs.result import RunResult

Runs = Mapping[int, RunResult]


@dataclass(frozen=True, kw_only=True)
class EqualParameters:
    """The quality of the baseline's router with the parameters of an arm."""

    values: Mapping[int, float]
    """Seed -> metric on the validation split."""
    note: str
    """Which arms it was read from."""


def find_equal_parameters(arm: str, runs: Mapping[str, Runs], baseline: str, metric: str) -> EqualParameters | None:
    """Return a reference with the total parameters of an arm; None if the experiment has none.

    It is an arm with the baseline's router and parameters within 2 %, or, between a smaller and a larger one, linear in
    the logarithm of the parameters; never beyond the largest.
    """
    router = _router(runs[baseline])
    params = count_parameters(runs[arm])
    if params is None or _router(runs[arm]) == router:
        return None
    sizes = {
        other: size
        for other, of_arm in runs.items()
        if of_arm and _router(of_arm) == router and (size := count_parameters(of_arm)) is not None
    }
    near = [other for other, size in sizes.items() if abs(size / params - 1) <= TOLERANCE]
    if near:
        reference = min(near, key=lambda other: abs(sizes[other] - params))
        return EqualParameters(values=_read_quality(runs[reference], metric), note=f"parameters of {reference}")
    smaller = [other for other, size in sizes.items() if size < params]
    larger = [other for other, size in sizes.items() if size > params]
    if not smaller or not larger:
        return None
    low, high = max(smaller, key=sizes.__getitem__), min(larger, key=sizes.__getitem__)
    share = log(params / sizes[low]) / log(sizes[high] / sizes[low])
    of_low, of_high = _read_quality(runs[low], metric), _read_quality(runs[high], metric)
    values = {seed: (1 - share) * of_low[seed] + share * of_high[seed] for seed in of_low if seed in of_high}
    return EqualParameters(values=values, note=f"parameters between {low} and {high}, linear in their logarithm")


def count_parameters(runs: Runs) -> float | None:
    """Return the mean number of total parameters; None where it is not recorded."""
    counts = [run.cost.get("total_params", 0.0) for run in runs.values()]
    return fmean(counts) if counts and min(counts) > 0 else None


def _router(runs: Runs) -> str:
    """Return the name of the router of an arm's runs, empty without any."""
    return next((str(run.config.get("router", {}).get("name", "")) for run in runs.values()), "")


def _read_quality(runs: Runs, metric: str) -> dict[int, float]:
    return {seed: run.validation[metric] for seed, run in runs.items() if metric in run.validation}
