"""The comparison of arms: from the results of runs to differences with intervals and verdicts.

Every arm is compared with one baseline over the seeds both have finished; Holm corrects for the number of
arms. Nothing is left out: failed and missing cells, dropped seeds and mismatches are part of the value.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from statistics import fmean, median

from moebench.analysis.compare import statistics as st
from moebench.analysis.compare.matching import arms_without_verdict, cost_ratio, matched_or_refuse
from moebench.analysis.compare.result_grid import Expected, Sorted, sort_results
from moebench.analysis.compare.settings import settings_notes
from moebench.analysis.compare.values import (
    BEST,
    BITS_PER_BYTE,
    NON_CAUSAL,
    ArmSummary,
    Comparison,
    Difference,
    LostCell,
    Metric,
    Verdict,
)
from moebench.reporting.formatting import count
from moebench.runs.result import RunResult
from moebench.tasks.task import OUT_OF_DOMAIN

__all__ = ["ArmSummary", "Comparison", "Difference", "LostCell", "Metric", "compare"]


def compare(
    results: Sequence[RunResult],
    *,
    expected: Expected,
    baseline: str,
    metric: Metric = BITS_PER_BYTE,
    allow_mismatch: bool = False,
) -> Comparison:
    """Compare the arms of a grid with its baseline; `expected` holds (arm, seed, cell id) of every cell.

    Arms whose executed cost is not within 2 % of the baseline's are marked and get no verdict unless `allow_mismatch`
    is set. Raises UsageError for an unknown baseline or metric, a cell named twice, two arms of one cell, results
    without the metrics of the wanted split, and (unless `allow_mismatch` is set) for arms of other training tokens,
    data or evaluation.
    """
    grid = sort_results(results, expected, baseline=baseline, metric=metric)
    runs = {arm: list(grid.done[arm].values()) for arm in grid.arms}
    mismatched = matched_or_refuse(runs, baseline, allow=allow_mismatch)
    unmatched = arms_without_verdict(mismatched, allow=allow_mismatch)
    differences = compare_pairs(grid, unmatched=unmatched)
    arms = tuple(_summary(arm, grid, [mismatch.mark for mismatch in mismatched.get(arm, ())]) for arm in grid.arms)
    best, remarks = _best(grid, arms, unmatched)
    return Comparison(
        metric=metric.name,
        split=metric.split,
        lower_is_better=metric.lower_is_better,
        baseline=baseline,
        arms=tuple(replace(arm, marks=(BEST, *arm.marks)) if arm.arm == best else arm for arm in arms),
        differences=differences,
        failed=grid.failed,
        missing=grid.missing,
        notes=(
            *(f"{arm}: {mismatch.reason}" for arm, found in mismatched.items() for mismatch in found),
            *_notes(grid, differences, len(expected)),
            *remarks,
            *settings_notes([run.config for of_arm in runs.values() for run in of_arm], metric.split),
        ),
    )


def compare_pairs(grid: Sorted, *, unmatched: Collection[str] = ()) -> tuple[Difference, ...]:
    """Compare every other arm with the baseline; all the p values shown are one family for Holm."""
    others = [arm for arm in grid.arms if arm != grid.baseline]
    pairs = {
        arm: st.paired_difference(grid.quality(arm, seeds), grid.quality(grid.baseline, seeds))
        for arm in others
        if (seeds := grid.common_seeds(arm))
    }
    tested = {arm: pair.p for arm, pair in pairs.items() if pair.p is not None}
    p_holm = dict(zip(tested, st.holm(list(tested.values())), strict=True))
    spread = _pooled_spread(grid, [arm for arm, pair in pairs.items() if pair.sd])
    found = []
    for arm in others:
        pair = pairs.get(arm)
        difference = _difference(arm, grid, pair, p_holm.get(arm), _detectable(pair, spread, len(tested)))
        found.append(difference if arm not in unmatched else replace(difference, verdict="not matched"))
    return tuple(found)


def _pooled_spread(grid: Sorted, arms: Sequence[str]) -> st.SpreadEstimate | None:
    """Estimate the SD of the paired differences over the seeds that all these arms and the baseline have."""
    seeds = [seed for seed in grid.done[grid.baseline] if all(seed in grid.done[arm] for arm in arms)]
    if not arms or len(seeds) < st.MIN_SEEDS:
        return None
    return st.pooled_spread([grid.quality(arm, seeds) for arm in arms], grid.quality(grid.baseline, seeds))


def _detectable(
    pair: st.PairedDifference | None, spread: st.SpreadEstimate | None, num_comparisons: int
) -> float | None:
    """Return the smallest detectable difference; from the arm's own pairs where arms have too few seeds in common."""
    if pair is None or not pair.sd:
        return None
    if spread is None:
        return st.smallest_detectable(pair.sd, pair.num_seeds, num_comparisons, pair.num_seeds - 1)
    return st.smallest_detectable(spread.sd, pair.num_seeds, num_comparisons, spread.df)


def _difference(
    arm: str, grid: Sorted, pair: st.PairedDifference | None, p_holm: float | None, detectable: float | None
) -> Difference:
    has_diverged = grid.num_diverged(arm) + grid.num_diverged(grid.baseline) > 0
    return Difference(
        arm=arm,
        baseline=grid.baseline,
        seeds=grid.common_seeds(arm),
        mean=pair.mean if pair else None,
        interval=pair.interval if pair else None,
        p=pair.p if pair else None,
        p_holm=p_holm,
        p_exact=pair.p_exact if pair else None,
        effect_sd=pair.effect_sd if pair else None,
        smallest_detectable=detectable,
        verdict="diverged" if has_diverged else _verdict(pair, p_holm, grid.metric.lower_is_better),
    )


def _verdict(pair: st.PairedDifference | None, p_holm: float | None, lower_is_better: bool) -> Verdict:
    if pair is None or pair.num_seeds < st.MIN_SEEDS:
        return "too few seeds"
    if p_holm is None or p_holm > st.ALPHA:
        return "no difference shown"
    return "better" if (pair.mean < 0) == lower_is_better else "worse"


def _summary(arm: str, grid: Sorted, mismatch_marks: Iterable[str]) -> ArmSummary:
    runs, seeds = list(grid.done[arm].values()), tuple(grid.done[arm])
    quality = grid.quality(arm, seeds)
    speeds = _finite(run.throughput.get("tokens_per_s") for run in runs)
    return ArmSummary(
        arm=arm,
        seeds=seeds,
        num_failed=sum(cell.arm == arm for cell in grid.failed),
        num_diverged=grid.num_diverged(arm),
        num_missing=sum(cell.arm == arm for cell in grid.missing),
        mean=fmean(quality) if quality else None,
        interval=st.mean_interval(quality) if quality else None,
        values=dict(zip(seeds, quality, strict=True)),
        outside=_outside(arm, grid),
        domains=_domains([run.metrics for run in runs], grid.metric.name),
        load=_means([run.metrics for run in runs], "load/"),
        tokens_per_s=fmean(speeds) if speeds else None,
        throughput_share=_throughput_share(arm, grid),
        cost=_means([run.cost for run in runs], ""),
        flops_vs_baseline=_flops_vs_baseline(runs, list(grid.done[grid.baseline].values())),
        parallel=_means([run.throughput for run in runs], "parallel/"),
        marks=tuple(dict.fromkeys([*(mark for run in runs for mark in run.marks), *mismatch_marks])),
    )


def _flops_vs_baseline(runs: Sequence[RunResult], baseline_runs: Sequence[RunResult]) -> dict[str, float]:
    keys = {"training": "train_flops_per_token", "evaluation": "eval_flops_per_token"}
    ratios = {when: cost_ratio(key, runs, baseline_runs) for when, key in keys.items()}
    return {when: ratio for when, ratio in ratios.items() if ratio is not None}


def _outside(arm: str, grid: Sorted) -> dict[int, float]:
    """Return the metric out of domain of each seed that has a finite one."""
    found = {seed: run.metrics.get(f"{grid.metric.name}/{OUT_OF_DOMAIN}") for seed, run in grid.done[arm].items()}
    return {seed: value for seed, value in found.items() if value is not None and isfinite(value)}


def _domains(metrics: Sequence[Mapping[str, float]], metric: str) -> dict[str, float]:
    """Return the mean of the metric in each domain."""
    return {name: value for name, value in _means(metrics, f"{metric}/").items() if name != OUT_OF_DOMAIN}


def _throughput_share(arm: str, grid: Sorted) -> float | None:
    """Median speed over the common seeds as a share of the baseline's: one slow run does not decide."""
    seeds = grid.common_seeds(arm)
    ours, theirs = (
        _finite(grid.done[name][seed].throughput.get("tokens_per_s") for seed in seeds) for name in (arm, grid.baseline)
    )
    if not seeds or len(ours) < len(seeds) or len(theirs) < len(seeds) or median(theirs) <= 0:
        return None
    return median(ours) / median(theirs)


def _means(values: Sequence[Mapping[str, float]], prefix: str) -> dict[str, float]:
    """Average over runs every value whose name begins with the prefix, which is cut off."""
    names = dict.fromkeys(name for run in values for name in run if name.startswith(prefix))
    found = {name: _finite(run.get(name) for run in values) for name in names}
    return {name.removeprefix(prefix): fmean(numbers) for name, numbers in found.items() if numbers}


def _finite(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and isfinite(value)]


def _best(grid: Sorted, arms: Sequence[ArmSummary], unmatched: Collection[str]) -> tuple[str | None, list[str]]:
    """Name the arm that may be called best, or say why the one with the best mean may not.

    Best is what is better than every other matched arm, each pair tested over its common seeds and the p values
    corrected as one family; not what happens to have the best mean. An arm that sees later tokens, or of which a seed
    diverged, never is; a rival of which some diverged counts by the seeds that did not.
    """
    if not grid.done[grid.baseline]:  # whether arms are matched is not known
        return None, []
    contenders = [arm for arm in arms if arm.mean is not None and arm.arm not in unmatched]
    if len(contenders) < 2 or min(arm.num_done for arm in contenders) < st.MIN_SEEDS:
        return None, []
    seeds = [seed for seed in contenders[0].seeds if all(seed in arm.seeds for arm in contenders)]
    if len(seeds) < st.MIN_SEEDS:
        return None, [f"no arm is called best: {count(len(seeds), 'seed')} finished by all arms, {st.MIN_SEEDS} needed"]
    choose = min if grid.metric.lower_is_better else max
    leader = choose(contenders, key=lambda arm: fmean(arm.values[seed] for seed in seeds))
    leads = f"{leader.arm} has the best mean"
    if any(len(arm.seeds) > len(seeds) for arm in contenders):
        leads += f" over the {count(len(seeds), 'seed')} that all arms have finished"
    if leader.num_diverged:
        return None, [f"{leads} and is not called best: {leader.num_diverged} of {leader.num_planned} seeds diverged"]
    if NON_CAUSAL in leader.marks:
        return None, [f"{leads} and is not called best: its routing sees later tokens"]
    survivors = replace(grid, baseline=leader.arm, failed=())  # a rival's divergence does not stand in the leader's way
    against = compare_pairs(survivors, unmatched=unmatched)
    rivals = [difference for difference in against if difference.arm in {arm.arm for arm in contenders}]
    near = [rival.arm for rival in rivals if rival.verdict != "worse"]
    if near:
        return None, [f"{leads}, but is not shown to be better than {', '.join(near)}"]
    return leader.arm, []


def _notes(grid: Sorted, differences: Sequence[Difference], num_expected: int) -> list[str]:
    notes = []
    if grid.missing:
        notes.append(f"{len(grid.missing)} of {num_expected} cells have no result yet: this is an early look")
    if not grid.done[grid.baseline]:
        notes.append(f"{grid.baseline}, the baseline, has no finished run: no differences, matching not checked")
    if grid.foreign:
        notes.append(f"{len(grid.foreign)} results belong to no cell of this grid: {', '.join(grid.foreign)}")
    for difference in differences:
        ours, theirs = set(grid.done[difference.arm]), set(grid.done[grid.baseline])
        if ours and theirs and ours != theirs:
            left_out = ", ".join(str(seed) for seed in sorted(ours ^ theirs))
            notes.append(f"{difference.arm}: difference over common seeds only, without seed {left_out}")
        if len(difference.seeds) >= st.MIN_SEEDS and difference.p is None:
            notes.append(f"{difference.arm}: the same difference for every seed; nothing tells chance from effect")
    return notes
