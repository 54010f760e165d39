"""The differences of all arms to a baseline: tests, corrections over the arms, intervals, verdicts."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from moebench.analysis.compare import statistics as st
from moebench.analysis.compare.result_grid import ResultGrid
from moebench.analysis.compare.values import Difference
from moebench.analysis.compare.verdict import decide


def compare_pairs(grid: ResultGrid, *, unmatched: Collection[str] = ()) -> tuple[Difference, ...]:
    """Return the difference of every other arm to the baseline.

    The p values of differences are one family for Holm, those of equivalence another.
    """
    others = [arm for arm in grid.arms if arm != grid.baseline]
    pairs = {
        arm: st.paired_difference(grid.get_quality(arm, seeds), grid.get_quality(grid.baseline, seeds))
        for arm in others
        if (seeds := grid.common_seeds(arm))
    }
    p_holm = _correct({arm: pair.p for arm, pair in pairs.items()})
    p_equivalence = _equivalence_p_values(grid, pairs)
    p_equivalence_holm = _correct(p_equivalence)
    spread = _pooled_spread(grid, [arm for arm, pair in pairs.items() if pair.sd])
    differences = []
    for arm in others:
        pair, level = pairs.get(arm), grid.choose_level(arm, len(p_holm)).alpha
        verdict = decide(
            pair,
            p_holm.get(arm),
            p_equivalence_holm.get(arm),
            lower_is_better=grid.metric.lower_is_better,
            alpha=level,
        )
        if grid.count_diverged(arm) + grid.count_diverged(grid.baseline) > 0:
            verdict = "diverged"
        differences.append(
            replace(
                _difference(arm, grid, pair, len(p_holm)),
                p_holm=p_holm.get(arm),
                p_equivalence=p_equivalence.get(arm),
                p_equivalence_holm=p_equivalence_holm.get(arm),
                smallest_detectable=_smallest_detectable(pair, spread, len(p_holm)),
                verdict="not matched" if arm in unmatched else verdict,
                level=level,
            )
        )
    return tuple(differences)


def _correct(p_values: Mapping[str, float | None]) -> dict[str, float]:
    """Return the p values of the arms that have one, corrected as one family."""
    tested = {arm: p for arm, p in p_values.items() if p is not None}
    return dict(zip(tested, st.holm(list(tested.values())), strict=True))


def _equivalence_p_values(grid: ResultGrid, pairs: Mapping[str, st.PairedDifference]) -> dict[str, float | None]:
    """Return p of the equivalence test of each pair, the margin being a share of the baseline's mean."""
    baseline = grid.get_quality(grid.baseline, tuple(grid.done[grid.baseline]))
    margin = grid.metric.margin * abs(fmean(baseline)) if baseline else 0.0
    return {
        arm: None if pair.sd is None else st.equivalence_p(pair.mean, pair.sd, pair.num_seeds, margin)
        for arm, pair in pairs.items()
    }


def _pooled_spread(grid: ResultGrid, arms: Sequence[str]) -> st.SpreadEstimate | None:
    """Estimate the SD of the paired differences over the seeds that all these arms and the baseline have."""
    seeds = [seed for seed in grid.done[grid.baseline] if all(seed in grid.done[arm] for arm in arms)]
    if not arms or len(seeds) < st.MIN_SEEDS:
        return None
    return st.pooled_spread([grid.get_quality(arm, seeds) for arm in arms], grid.get_quality(grid.baseline, seeds))


def _smallest_detectable(
    pair: st.PairedDifference | None, spread: st.SpreadEstimate | None, num_comparisons: int
) -> float | None:
    """Return the smallest detectable difference, from the pairs of this arm alone if arms share too few seeds."""
    if pair is None or not pair.sd:
        return None
    if spread is None:
        return st.smallest_detectable(pair.sd, pair.num_seeds, num_comparisons, pair.num_seeds - 1)
    return st.smallest_detectable(spread.sd, pair.num_seeds, num_comparisons, spread.df)


def _difference(arm: str, grid: ResultGrid, pair: st.PairedDifference | None, num_comparisons: int) -> Difference:
    """Return the difference of an arm before corrections and verdict."""
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
        p_holm=None,
        p_exact=pair.p_exact if pair else None,
        effect_sd=pair.effect_sd if pair else None,
        effect_interval=pair.effect_interval if pair else None,
        smallest_detectable=None,
        verdict="too few seeds",
    )
