"""Effective compute of all arms of a ladder: estimates, table, sentences, JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moebench.analysis import statistics as st
from moebench.analysis.pooled.effective_compute import (
    MIN_DECADES,
    MIN_SIZES,
    EffectiveCompute,
    Factor,
    SizePairs,
    count_decades,
    estimate_effective_compute,
)
from moebench.analysis.pooled.ladder import Ladder
from moebench.errors import UsageError
from moebench.reporting.formatting import MISSING, format_p, format_plural
from moebench.reporting.report import Report
from moebench.reporting.table import Column, Table
from moebench.runs.trivial_baselines import BELOW_TRIVIAL

LEGEND = (
    "compute: how many times more training FLOPs, as executed, the baseline would need for the quality of the arm;"
    " below 1 the arm is worse. wall clock: the same in seconds of training: compute times the arm's FLOP/s over the"
    " baseline's.",
    "One factor for all sizes, from a power law with an offset fitted to the baseline; 95 % intervals from bootstraps"
    " over seeds and over sizes, the wider one. Where the factor changes with the size they are too narrow: look at the"
    " factors of the single sizes.",
)


@dataclass(frozen=True, kw_only=True)
class ArmEffectiveCompute:
    """The effective compute of one arm, or why there is none."""

    arm: str
    estimate: EffectiveCompute | None
    p_holm: float | None
    problem: str
    """Why there is no estimate; empty if there is one."""
    notes: tuple[str, ...]


def evaluate_ladder(ladder: Ladder) -> tuple[ArmEffectiveCompute, ...]:
    """Estimate every arm; raise UsageError where the ladder is too short for any."""
    _require_length(ladder.baseline_flops)
    estimates: dict[str, EffectiveCompute | None] = {}
    problems: dict[str, str] = {}
    for arm in ladder.arms:
        pairs = ladder.pair_sizes(arm)
        problems[arm] = _find_problem(pairs)
        estimates[arm] = None if problems[arm] else estimate_effective_compute(pairs)
    tested = {arm: e.compute.p for arm, e in estimates.items() if e is not None and e.compute.p is not None}
    for arm in [arm for arm in tested if ladder.count_diverged(arm)]:  # the other runs are a biased sample
        del tested[arm]
    p_holm = st.correct_family(tested)
    return tuple(
        ArmEffectiveCompute(
            arm=arm,
            estimate=estimate,
            p_holm=p_holm.get(arm),
            problem=problems[arm],
            notes=tuple(_list_notes(ladder, arm, estimate)),
        )
        for arm, estimate in estimates.items()
    )


def _require_length(flops: Sequence[float]) -> None:
    """Raise UsageError for a ladder that is too short."""
    decades = count_decades(flops)
    if decades < MIN_DECADES or len(flops) < MIN_SIZES:
        raise UsageError(
            f"effective compute: {format_plural(len(flops), 'size')} over {decades:.1f} decades of training FLOPs of"
            f" the baseline ({flops[0]:.1e} to {flops[-1]:.1e}); needed: {MIN_SIZES} sizes over {MIN_DECADES} decades"
        )


def _find_problem(pairs: Sequence[SizePairs]) -> str:
    if len(pairs) < MIN_SIZES:
        return f"{format_plural(len(pairs), 'size')}, {MIN_SIZES} needed"
    decades = count_decades([size.baseline_flops for size in pairs])
    return "" if decades >= MIN_DECADES else f"{decades:.1f} decades, {MIN_DECADES} needed"


def _list_notes(ladder: Ladder, arm: str, estimate: EffectiveCompute | None) -> list[str]:
    notes = []
    problem = ladder.find_time_problem(arm)
    if problem:
        notes.append(f"{'times are not comparable' if ladder.ignores_conditions else 'no wall clock'}: at {problem}")
    num_diverged = ladder.count_diverged(arm)
    if num_diverged:
        runs = format_plural(num_diverged, "run")
        notes.append(
            f"{runs} of the arm or the baseline diverged: the others are a biased sample, and there is no verdict"
        )
    if estimate is not None and estimate.compute.interval is None:
        notes.append("no interval: it needs 2 seeds at each size and 4 more than there are sizes")
    return notes


def build_ladder_report(ladder: Ladder) -> Report:
    """Return the table of effective compute, a sentence for each arm, and the JSON values."""
    worths = evaluate_ladder(ladder)
    sizes = ", ".join(
        f"{size.name} {format_flops(flops)}" for size, flops in zip(ladder.sizes, ladder.baseline_flops, strict=True)
    )
    subject = f"{ladder.metric.replace('_', ' ')} on the {ladder.split} split"
    table = Table(
        title=f"Effective compute against {ladder.baseline}: {subject}",
        columns=(
            Column(header="arm", align="left", wraps=True),
            Column(header="pairs"),
            Column(header="compute"),
            Column(header="p Holm"),
            Column(header="wall clock"),
            *(Column(header=size.name) for size in ladder.sizes),
        ),
        rows=tuple(_build_row(ladder, worth) for worth in worths),
        notes=(f"Training FLOPs of {ladder.baseline}: {sizes}. Columns of sizes: compute at this size alone.",),
    )
    sentences = [describe_effective_compute(ladder, worth) for worth in worths]
    below = [f"{size.name}: {BELOW_TRIVIAL}" for size in ladder.sizes if size.is_below_trivial]
    notes = [f"Note: {worth.arm}: {note}." for worth in worths for note in worth.notes]
    return Report(
        tables=(table,),
        notes=(*sentences, *below, *notes, *LEGEND),
        values=_to_dict(ladder, worths, sentences),
    )


def describe_effective_compute(ladder: Ladder, worth: ArmEffectiveCompute) -> str:
    """Return what an arm is worth, in a sentence that can be pasted."""
    if worth.estimate is None:
        return f"{worth.arm}: no effective compute ({worth.problem})."
    decades = count_decades(ladder.baseline_flops)
    text = f"{worth.arm} is worth {format_factor(worth.estimate.compute)} compute of {ladder.baseline}"
    if worth.estimate.wall_clock is not None:
        text += f", {format_factor(worth.estimate.wall_clock)} wall clock"
    return f"{text} ({format_plural(len(worth.estimate.by_size), 'size')}, {decades:.1f} decades)."


def format_factor(factor: Factor | None) -> str:
    """Return 1.07x [1.02, 1.12]; a dash for None."""
    if factor is None:
        return MISSING
    interval = "" if factor.interval is None else f" [{factor.interval[0]:.2f}, {factor.interval[1]:.2f}]"
    return f"{factor.value:.2f}x{interval}"


def format_flops(flops: float) -> str:
    """Return a number of FLOPs with two digits: 1.2e+14."""
    return f"{flops:.1e}"


def _build_row(ladder: Ladder, worth: ArmEffectiveCompute) -> tuple[str, ...]:
    pairs = str(sum(size.log_loss_S.size for size in ladder.pair_sizes(worth.arm)))
    if worth.estimate is None:
        return (worth.arm, pairs, worth.problem, MISSING, MISSING, *(MISSING for _ in ladder.sizes))
    by_size = (
        f"{worth.estimate.by_size[size.name]:.2f}x" if size.name in worth.estimate.by_size else MISSING
        for size in ladder.sizes
    )
    estimate = worth.estimate
    return (
        worth.arm,
        pairs,
        format_factor(estimate.compute),
        format_p(worth.p_holm),
        format_factor(estimate.wall_clock),
        *by_size,
    )


def _to_dict(ladder: Ladder, worths: Sequence[ArmEffectiveCompute], sentences: Sequence[str]) -> dict[str, Any]:
    arms = {
        worth.arm: {
            **(asdict(worth.estimate) if worth.estimate else {"compute": None}),
            "p_holm": worth.p_holm,
            "problem": worth.problem or None,
            "notes": list(worth.notes),
            "sentence": sentence,
        }
        for worth, sentence in zip(worths, sentences, strict=True)
    }
    return {
        "metric": ladder.metric,
        "split": ladder.split,
        "baseline": ladder.baseline,
        "sizes": dict(zip([size.name for size in ladder.sizes], ladder.baseline_flops, strict=True)),
        "below_trivial_baselines": {size.name: size.is_below_trivial for size in ladder.sizes},
        "arms": arms,
    }
