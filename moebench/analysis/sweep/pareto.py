"""Which points of a curve are dominated: another one costs no more and is shown to be better."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moebench.analysis import statistics as st
from moebench.analysis.compare.matching import TOLERANCE
from moebench.analysis.sweep.points import Point


@dataclass(frozen=True, kw_only=True)
class Domination:
    """The point that is shown to be better at no more FLOPs."""

    by: Point
    difference: float
    """Quality of the dominated point minus that of the other, mean over common seeds."""
    interval: st.Interval
    p_holm: float

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "by": {"arm": self.by.arm, "settings": dict(self.by.settings)},
            "difference": self.difference,
            "interval": list(self.interval),
            "p_holm": self.p_holm,
        }


@dataclass(frozen=True, kw_only=True)
class Front:
    """The dominated points, and how many pairs were tested."""

    dominated: dict[int, Domination]
    """Index of a point -> the one with the smallest p value of those that dominate it."""
    num_tests: int

    def describe(self) -> str:
        """Return the rule in one line."""
        if not self.num_tests:
            return "Pareto front: not tested; this needs three common seeds."
        return (
            "Pareto front: a point is dominated where another one costs no more FLOPs (equal within"
            f" {100 * TOLERANCE:.0f} %) and is better by the paired t-test over common seeds, p <= {st.ALPHA:g} after"
            f" Holm's correction for {self.num_tests} pairs; all others may be on the front."
        )


def find_front(points: Sequence[Point], *, lower_is_better: bool) -> Front:
    """Test each pair of points whose better point costs no more."""
    tests = []
    for first, second in itertools.combinations(range(len(points)), 2):
        pair = _compare(points[first], points[second])
        if pair is None:
            continue
        worse, better = (first, second) if (pair.mean > 0) == lower_is_better else (second, first)
        if points[better].mean_flops <= (1 + TOLERANCE) * points[worse].mean_flops:
            tests.append((worse, better, pair))
    if not tests:
        return Front(dominated={}, num_tests=0)
    dominated: dict[int, Domination] = {}
    p_values = st.holm([pair.p for _, _, pair in tests if pair.p is not None])
    for (worse, better, pair), p_holm in zip(tests, p_values, strict=True):
        is_nearest = worse not in dominated or p_holm < dominated[worse].p_holm
        if p_holm <= st.ALPHA and pair.mean != 0 and pair.interval is not None and is_nearest:
            low, high = pair.interval
            mean, interval = (pair.mean, (low, high)) if worse < better else (-pair.mean, (-high, -low))
            dominated[worse] = Domination(by=points[better], difference=mean, interval=interval, p_holm=float(p_holm))
    return Front(dominated=dominated, num_tests=len(tests))


def _compare(point: Point, other: Point) -> st.PairedDifference | None:
    """Return the difference of two points over common seeds; None without a test."""
    common = [seed for seed in point.quality if seed in other.quality]
    if len(common) < st.MIN_SEEDS:
        return None
    pair = st.compute_paired_difference([point.quality[s] for s in common], [other.quality[s] for s in common])
    return pair if pair.p is not None else None
