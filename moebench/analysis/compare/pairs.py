"""The differences of all arms to a baseline: tests, corrections over the arms, intervals, verdicts."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from statistics import fmean

from moebench.analysis import statistics as st
from moebench.analysis.compare.result_grid import ResultGrid
from moebench.analysis.compare.values import Difference
from moebench.analysis.compare.verdict import Verdict, decide


@dataclass(frozen=True, kw_only=True)
class PairedTests:
    """The paired differences of arms to the baseline with the p values of both families, before verdicts."""

    pairs: Mapping[str, st.PairedDifference]
    """Arm -> difference; without arms that share no seed with the baseline."""
    p_pooled: Mapping[str, float]
    """p value from the noise of the whole table; arms that do not vary over seeds are left out."""
    p_holm: Mapping[str, float]
    p_equivalence: Mapping[str, float]
    p_equivalence_holm: Mapping[str, float]


def compare_pairs(grid: ResultGrid, *, unmatched: Collection[str] = ()) -> tuple[Difference, ...]:
    """Return the difference of every other arm to the baseline.

    The p values of differences are one family for Holm, those of equivalence another.
    """
    others = [arm for arm in grid.arms if arm != grid.baseline]
    pairs = {
        arm: st.compute_paired_difference(grid.get_quality(arm, seeds), grid.get_quality(grid.baseline, seeds))
        for arm in others
        if (seeds := grid.common_seeds(arm))
    }
    tests = _test_pairs(grid, pairs)
    spread = _pool_spread(grid, pairs, is_capped=False)
    return tuple(_difference(arm, grid, tests, spread, is_matched=arm not in unmatched) for arm in others)


def _test_pairs(grid: ResultGrid, pairs: Mapping[str, st.PairedDifference]) -> PairedTests:
    """Test each pair by its own noise and by that of the table: the larger p of the two counts."""
    spread = _pool_spread(grid, pairs, is_capped=True)
    p_pooled = {
        arm: st.spread_p(pair.mean, spread, pair.num_seeds) for arm, pair in pairs.items() if spread and pair.sd
    }
    p_values = {arm: max(pair.p, p_pooled.get(arm, 0.0)) for arm, pair in pairs.items() if pair.p is not None}
    baseline = grid.get_quality(grid.baseline, tuple(grid.done[grid.baseline]))
    margin = grid.metric.margin * abs(fmean(baseline)) if baseline else 0.0
    p_equivalence = {}
    for arm, pair in pairs.items():
        estimates = [pair.spread, *([spread] if spread and pair.sd else [])] if pair.spread else []
        by_spread = [st.equivalence_p(pair.mean, estimate, pair.num_seeds, margin) for estimate in estimates]
        tested = [p for p in by_spread if p is not None]
        if tested:
            p_equivalence[arm] = max(tested)
    return PairedTests(
        pairs=pairs,
        p_pooled=p_pooled,
        p_holm=st.correct_family(p_values),
        p_equivalence=p_equivalence,
        p_equivalence_holm=st.correct_family(p_equivalence),
    )


def _pool_spread(
    grid: ResultGrid, pairs: Mapping[str, st.PairedDifference], *, is_capped: bool
) -> st.SpreadEstimate | None:
    """Estimate the SD of paired differences over the seeds that all arms with some spread and the baseline have.

    Arms with a diverged seed are left out. `is_capped`: a far noisier arm counts less.
    """
    arms = [arm for arm, pair in pairs.items() if pair.sd and not grid.count_diverged(arm)]
    seeds = [seed for seed in grid.done[grid.baseline] if all(seed in grid.done[arm] for arm in arms)]
    if not arms or len(seeds) < st.MIN_SEEDS:
        return None
    estimate = st.table_spread if is_capped else st.estimate_pooled_spread
    return estimate([grid.get_quality(arm, seeds) for arm in arms], grid.get_quality(grid.baseline, seeds))


def _difference(
    arm: str, grid: ResultGrid, tests: PairedTests, spread: st.SpreadEstimate | None, *, is_matched: bool
) -> Difference:
    pair, num_comparisons = tests.pairs.get(arm), len(tests.p_holm)
    level = grid.choose_level(arm, num_comparisons).alpha
    together = None
    if pair and pair.interval and pair.sd is not None:
        together = st.t_interval(pair.mean, pair.sd, pair.num_seeds, num_comparisons)
    return Difference(
        arm=arm,
        baseline=grid.baseline,
        seeds=grid.common_seeds(arm),
        mean=pair.mean if pair else None,
        interval=pair.interval if pair else None,
        simultaneous_interval=together,
        p=pair.p if pair else None,
        p_pooled=tests.p_pooled.get(arm),
        p_holm=tests.p_holm.get(arm),
        p_exact=pair.p_exact if pair else None,
        p_equivalence=tests.p_equivalence.get(arm),
        p_equivalence_holm=tests.p_equivalence_holm.get(arm),
        effect_sd=pair.effect_sd if pair else None,
        effect_interval=pair.effect_interval if pair else None,
        smallest_detectable=_smallest_detectable(pair, spread, num_comparisons),
        verdict=_judge(arm, grid, tests, level) if is_matched else "not matched",
        level=level,
    )


def _judge(arm: str, grid: ResultGrid, tests: PairedTests, level: float) -> Verdict:
    if grid.count_diverged(arm) + grid.count_diverged(grid.baseline) > 0:
        return "diverged"
    return decide(
        tests.pairs.get(arm),
        tests.p_holm.get(arm),
        tests.p_equivalence_holm.get(arm),
        lower_is_better=grid.metric.lower_is_better,
        alpha=level,
    )


def _smallest_detectable(
    pair: st.PairedDifference | None, spread: st.SpreadEstimate | None, num_comparisons: int
) -> float | None:
    """Return the smallest detectable difference, from the pairs of this arm alone if arms share too few seeds."""
    if pair is None or not pair.sd:
        return None
    if spread is None:
        return st.smallest_detectable(pair.sd, pair.num_seeds, num_comparisons, pair.num_seeds - 1)
    return st.smallest_detectable(spread.sd, pair.num_seeds, num_comparisons, spread.df)
