"""The comparison of arms: differences to a baseline with intervals and verdicts, from the results of runs.

Every arm is compared with the baseline over the seeds that both have finished; Holm corrects for the number of
arms. Failed and missing cells, seeds without a partner and mismatches are part of the comparison.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from statistics import fmean, median

from moebench.analysis import statistics as st
from moebench.analysis.compare.matching import (
    DATA_MARKS,
    Mismatch,
    check_matching,
    compute_cost_ratio,
    list_solved_keys,
    list_unmatched_arms,
)
from moebench.analysis.compare.pairs import compare_pairs
from moebench.analysis.compare.rare_bad_seeds import find_rare_bad_seeds
from moebench.analysis.compare.result_grid import Expected, ResultGrid, arrange_results, note_levels
from moebench.analysis.compare.settings import note_varied_settings
from moebench.analysis.compare.values import (
    BEST,
    BITS_PER_BYTE,
    NON_CAUSAL,
    ArmSummary,
    Comparison,
    ComparisonMetric,
    Difference,
)
from moebench.analysis.design.protocol import NO_PROTOCOL, Protocol
from moebench.reporting.formatting import format_plural
from moebench.runs.result import RunResult
from moebench.tasks.task import OUT_OF_DOMAIN


def compare(
    results: Sequence[RunResult],
    *,
    expected: Expected,
    baseline: str,
    metric: ComparisonMetric = BITS_PER_BYTE,
    allow_mismatch: bool = False,
    protocol: Protocol = NO_PROTOCOL,
) -> Comparison:
    """Compare the arms of a grid with its baseline; `expected` holds (arm, seed, cell id) of every cell.

    Arms whose executed cost is not within 2 % of the baseline's are marked and get no verdict unless `allow_mismatch`
    is set. Raises UsageError for an unknown baseline or metric, a cell named twice, two arms of one cell, results
    without metrics of the split, and (unless `allow_mismatch` is set) for arms of other training tokens,
    data or evaluation. `protocol`: settings that arms have chosen, and planned seeds.
    """
    grid = replace(arrange_results(results, expected, baseline=baseline, metric=metric), plan=protocol.plan)
    runs = {arm: list(grid.done[arm].values()) for arm in grid.arms}
    mismatches = check_matching(runs, baseline, allow=allow_mismatch or protocol.has_several_data)
    unmatched = list_unmatched_arms(mismatches, allow=allow_mismatch)
    differences = compare_pairs(grid, unmatched=unmatched)
    arms = tuple(_summarise(arm, grid, [mismatch.mark for mismatch in mismatches.get(arm, ())]) for arm in grid.arms)
    best, best_notes = _find_best(grid, arms, unmatched)
    configs = [run.config for of_arm in runs.values() for run in of_arm]
    return Comparison(
        metric=metric.name,
        split=metric.split,
        lower_is_better=metric.lower_is_better,
        margin=metric.margin,
        plan=grid.plan,
        baseline=baseline,
        arms=tuple(replace(arm, marks=(BEST, *arm.marks)) if arm.arm == best else arm for arm in arms),
        differences=differences,
        rare_bad_seeds=find_rare_bad_seeds(arms, lower_is_better=metric.lower_is_better),
        failed=grid.failed,
        missing=grid.missing,
        notes=(
            *_note_mismatches(mismatches, baseline, has_several_data=protocol.has_several_data),
            *_notes(grid, differences, len(expected)),
            *note_levels(grid, sum(difference.p is not None for difference in differences)),
            *best_notes,
            *_note_versions([run.version for of_arm in runs.values() for run in of_arm]),
            *note_varied_settings(configs, metric.split, (*protocol.tuned_keys, *list_solved_keys(mismatches))),
        ),
    )


def _note_mismatches(
    mismatches: Mapping[str, Sequence[Mismatch]], baseline: str, *, has_several_data: bool
) -> Iterator[str]:
    """Yield the reason of each mismatch; one line for all arms with other data, where that is intended."""
    reasons = [(arm, mismatch) for arm, of_arm in mismatches.items() for mismatch in of_arm]
    others = [arm for arm, mismatch in reasons if mismatch.mark in DATA_MARKS]
    if others and has_several_data:
        yield (
            f"{format_plural(len(set(others)), 'arm')} with other data than '{baseline}' have no verdict here: the"
            " tables of transfer compare them with their parents"
        )
    for arm, mismatch in reasons:
        if not (has_several_data and mismatch.mark in DATA_MARKS):
            yield f"{arm}: {mismatch.reason}"


def _summarise(arm: str, grid: ResultGrid, mismatch_marks: Iterable[str]) -> ArmSummary:
    runs, seeds = list(grid.done[arm].values()), tuple(grid.done[arm])
    quality = grid.get_quality(arm, seeds)
    speeds = _finite(run.throughput.get("tokens_per_s") for run in runs)
    return ArmSummary(
        arm=arm,
        seeds=seeds,
        num_failed=sum(cell.arm == arm for cell in grid.failed),
        num_diverged=grid.count_diverged(arm),
        num_missing=sum(cell.arm == arm for cell in grid.missing),
        mean=fmean(quality) if quality else None,
        interval=st.mean_interval(quality) if quality else None,
        values=dict(zip(seeds, quality, strict=True)),
        out_of_domain=_out_of_domain(arm, grid),
        domains=_average_domains([run.metrics for run in runs], grid.metric.name),
        load=_average_metrics([run.metrics for run in runs], "load/"),
        tokens_per_s=fmean(speeds) if speeds else None,
        throughput_share=_throughput_share(arm, grid),
        mfu=_average_metrics([run.throughput for run in runs], "").get("mfu"),
        cost=_average_metrics([run.cost for run in runs], ""),
        flops_vs_baseline=_flops_vs_baseline(runs, list(grid.done[grid.baseline].values())),
        parallel=_average_metrics([run.throughput for run in runs], "parallel/"),
        marks=tuple(dict.fromkeys([*(mark for run in runs for mark in run.marks), *mismatch_marks])),
    )


def _flops_vs_baseline(runs: Sequence[RunResult], baseline_runs: Sequence[RunResult]) -> dict[str, float]:
    keys = {"training": "train_flops_per_token", "evaluation": "eval_flops_per_token"}
    ratios = {phase: compute_cost_ratio(key, runs, baseline_runs) for phase, key in keys.items()}
    return {phase: ratio for phase, ratio in ratios.items() if ratio is not None}


def _out_of_domain(arm: str, grid: ResultGrid) -> dict[int, float]:
    """Return the metric out of domain of each seed that has a finite one."""
    values = {seed: run.metrics.get(f"{grid.metric.name}/{OUT_OF_DOMAIN}") for seed, run in grid.done[arm].items()}
    return {seed: value for seed, value in values.items() if value is not None and isfinite(value)}


def _average_domains(metrics: Sequence[Mapping[str, float]], metric: str) -> dict[str, float]:
    """Return the mean of the metric in each domain."""
    return {name: value for name, value in _average_metrics(metrics, f"{metric}/").items() if name != OUT_OF_DOMAIN}


def _throughput_share(arm: str, grid: ResultGrid) -> float | None:
    """Return the median speed over the common seeds as a share of the baseline's median: robust to one slow run."""
    seeds = grid.common_seeds(arm)
    ours, theirs = (
        _finite(grid.done[name][seed].throughput.get("tokens_per_s") for seed in seeds) for name in (arm, grid.baseline)
    )
    if not seeds or len(ours) < len(seeds) or len(theirs) < len(seeds) or median(theirs) <= 0:
        return None
    return median(ours) / median(theirs)


def _average_metrics(values: Sequence[Mapping[str, float]], prefix: str) -> dict[str, float]:
    """Average over runs every value whose name begins with the prefix, which is cut off."""
    names = dict.fromkeys(name for run in values for name in run if name.startswith(prefix))
    finite = {name: _finite(run.get(name) for run in values) for name in names}
    return {name.removeprefix(prefix): fmean(numbers) for name, numbers in finite.items() if numbers}


def _finite(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and isfinite(value)]


def _find_best(
    grid: ResultGrid, arms: Sequence[ArmSummary], unmatched: Collection[str]
) -> tuple[str | None, list[str]]:
    """Return the best arm, or None and a note why the arm with the best mean is not.

    The best arm is better than every other matched arm, each pair tested over its common seeds and the p values
    corrected as one family. An arm that sees later tokens or has a diverged seed is never best; another arm with
    diverged seeds is compared by its other seeds.
    """
    if not grid.done[grid.baseline]:  # matching was not checked
        return None, []
    contenders = [arm for arm in arms if arm.mean is not None and arm.arm not in unmatched]
    if len(contenders) < 2 or min(arm.num_done for arm in contenders) < st.MIN_SEEDS:
        return None, []
    seeds = [seed for seed in contenders[0].seeds if all(seed in arm.seeds for arm in contenders)]
    num_seeds = format_plural(len(seeds), "seed")
    if len(seeds) < st.MIN_SEEDS:
        return None, [f"no arm is called best: {num_seeds} finished by all arms, {st.MIN_SEEDS} needed"]
    select = min if grid.metric.lower_is_better else max
    leader = select(contenders, key=lambda arm: fmean(arm.values[seed] for seed in seeds))
    statement = f"{leader.arm} has the best mean"
    if any(len(arm.seeds) > len(seeds) for arm in contenders):
        statement += f" over the {num_seeds} that all arms have finished"
    obstacle = _find_obstacle(grid, leader, contenders, unmatched)
    return (None, [f"{statement}{obstacle}"]) if obstacle else (leader.arm, [])


def _find_obstacle(
    grid: ResultGrid, leader: ArmSummary, contenders: Sequence[ArmSummary], unmatched: Collection[str]
) -> str | None:
    """Return why the arm with the best mean is not called best; None if it is."""
    if leader.num_diverged:
        return f" and is not called best: {leader.num_diverged} of {leader.num_planned} seeds diverged"
    if NON_CAUSAL in leader.marks:
        return " and is not called best: its routing sees later tokens"
    against_leader = compare_pairs(replace(grid, baseline=leader.arm, failed=()), unmatched=unmatched)
    others = {arm.arm for arm in contenders}
    undecided = [pair.arm for pair in against_leader if pair.arm in others and pair.verdict != "worse"]
    return f", but is not shown to be better than {', '.join(undecided)}" if undecided else None


def _note_versions(versions: Sequence[str]) -> list[str]:
    """Return a note if the runs were trained by several versions of moebench; those that are not known do not count."""
    known = sorted({version for version in versions if version})
    return [f"the runs were trained by different versions of moebench: {', '.join(known)}"] if len(known) > 1 else []


def _notes(grid: ResultGrid, differences: Sequence[Difference], num_expected: int) -> list[str]:
    notes = []
    if grid.missing:
        notes.append(f"{len(grid.missing)} of {num_expected} cells have no result yet: this is an early look")
    if not grid.done[grid.baseline]:
        notes.append(f"{grid.baseline}, the baseline, has no finished run: no differences, matching not checked")
    if grid.unexpected:
        ids = ", ".join(grid.unexpected)
        notes.append(f"{len(grid.unexpected)} results belong to no cell of this grid: {ids}")
    for difference in differences:
        ours, theirs = set(grid.done[difference.arm]), set(grid.done[grid.baseline])
        if ours and theirs and ours != theirs:
            left_out = ", ".join(str(seed) for seed in sorted(ours ^ theirs))
            notes.append(f"{difference.arm}: difference over common seeds only, without seed {left_out}")
        if len(difference.seeds) >= st.MIN_SEEDS and difference.p is None:
            notes.append(
                f"{difference.arm}: the same difference for every seed, so chance and effect cannot be distinguished"
            )
    return [*notes, *_note_unusual_agreement(differences)]


def _note_unusual_agreement(differences: Sequence[Difference]) -> list[str]:
    """Return a note for each arm that differs from the baseline by its own noise alone, not by that of the table."""
    p_holm = st.correct_family({pair.arm: pair.p for pair in differences if pair.p is not None})
    return [
        f"{difference.arm}: p Holm would be {p_holm[difference.arm]:.2g} by its own pairs alone, whose seeds agree"
        " more than those of the other arms: this gives no verdict (docs/statistics.md)"
        for difference in differences
        if p_holm.get(difference.arm, 1.0) <= difference.level < (difference.p_holm or 0.0)
        and difference.verdict in ("undecided", "equivalent")
    ]
