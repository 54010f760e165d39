"""Pooled experiments as tables and sentences."""

from moebench.analysis import statistics as st
from moebench.analysis.compare.verdict import DECIDED
from moebench.analysis.pooled.pool import Estimate, Pooled, PooledArm, TaskEffect
from moebench.reporting.formatting import MISSING, format_p, format_plural, format_signed
from moebench.reporting.report import Report
from moebench.reporting.table import Column, Table

LEGEND = (
    "Effects: the difference in units of the pooled SD of the paired differences of its experiment, positive where the"
    " arm is better. The SD is estimated: with 3 seeds such effects are 10 to 30 % too large on average.",
    "On these tasks: sign-flip test over all pairs, interval from the same test. Across tasks: each experiment is one"
    " unit, t test of their means; only this says something about further tasks. Both with Holm over the arms.",
)


def build_pooled_report(pooled: Pooled) -> Report:
    """Return the tables of pooled experiments, a sentence for each arm, and the JSON values."""
    problems = [
        f"FAILED {name}: {cell.arm}, seed {cell.seed} ({cell.id}): {cell.reason}"
        for name, comparison in pooled.experiments.items()
        for cell in comparison.failed
    ]
    problems += [
        f"MISSING {name}: {len(comparison.missing)} cells have no result yet"
        for name, comparison in pooled.experiments.items()
        if comparison.missing
    ]
    below = [
        f"{name}: {comparison.below_trivial_text}"
        for name, comparison in pooled.experiments.items()
        if comparison.below_trivial_text
    ]
    sentences = [describe_pooled_arm(pooled, arm) for arm in pooled.arms]
    values = pooled.to_dict()
    for arm, sentence in zip(pooled.arms, sentences, strict=True):
        values["arms"][arm.arm]["sentence"] = sentence
    return Report(
        tables=(_build_pooled_table(pooled), _build_task_table(pooled)),
        problems=tuple(problems),
        notes=(*sentences, *below, *_list_notes(pooled), *LEGEND),
        values=values,
    )


def describe_pooled_arm(pooled: Pooled, arm: PooledArm) -> str:
    """Return what is shown about an arm, in a sentence that can be pasted."""
    where = f"Over {format_plural(len(arm.counted), 'experiment')} ({format_plural(arm.num_pairs, 'pair')})"
    subject = f"{arm.arm} minus {pooled.baseline}"
    if arm.fixed is None or arm.verdict == "diverged":
        reasons = ", ".join(f"{task.reason} in {task.experiment}" for task in arm.tasks.values() if task.reason)
        return f"{subject}: no pooled verdict ({reasons})."
    verdict = {
        "better": f"{arm.arm} is better than {pooled.baseline}",
        "worse": f"{arm.arm} is worse than {pooled.baseline}",
        "undecided": f"whether {arm.arm} differs from {pooled.baseline} is undecided",
        "too few pairs": f"{arm.arm} has too few pairs for a verdict",
    }[arm.verdict]
    family = format_plural(sum(other.fixed is not None for other in pooled.arms), "arm")
    test = f"p Holm {format_p(arm.fixed.p_holm)} (sign flips, {family})"
    text = f"{where}, {verdict}: {_format_estimate(arm.fixed)} SD, {test}"
    if arm.across is None:
        return f"{text}; fewer than 3 experiments say nothing about further tasks."
    is_shown = arm.across.p_holm is not None and arm.across.p_holm <= st.ALPHA
    shown = "which holds across tasks" if is_shown and arm.verdict in ("better", "worse") else "not shown across tasks"
    return f"{text}; {shown} (t over {len(arm.counted)} task means, p Holm {format_p(arm.across.p_holm)})."


def _build_pooled_table(pooled: Pooled) -> Table:
    names = ", ".join(pooled.experiments)
    rows = []
    for arm in pooled.arms:
        count = f"{len(arm.counted)} of {len(pooled.experiments)}"
        fixed = (_format_estimate(arm.fixed), format_p(arm.fixed.p_holm)) if arm.fixed else (MISSING, MISSING)
        across = (_format_estimate(arm.across), format_p(arm.across.p_holm)) if arm.across else (MISSING, MISSING)
        rows.append((arm.arm, count, str(arm.num_pairs), *fixed, arm.verdict, *across))
    return Table(
        title=f"Pooled over {names}: minus {pooled.baseline}, in SDs of the paired difference, positive is better",
        columns=(
            Column(header="arm", align="left", wraps=True),
            Column(header="experiments"),
            Column(header="pairs"),
            Column(header="on these tasks"),
            Column(header="p Holm"),
            Column(header="verdict", align="left", wraps=True),
            Column(header="across tasks"),
            Column(header="p Holm"),
        ),
        rows=tuple(rows),
    )


def _build_task_table(pooled: Pooled) -> Table:
    return Table(
        title=f"By experiment: minus {pooled.baseline} in the unit of its metric (in SDs, positive is better)",
        columns=(
            Column(header="arm", align="left", wraps=True),
            *(
                Column(header=f"{name}: {comparison.metric.replace('_', ' ')}", wraps=True)
                for name, comparison in pooled.experiments.items()
            ),
        ),
        rows=tuple(
            (arm.arm, *(_format_task(arm.tasks.get(name)) for name in pooled.experiments)) for arm in pooled.arms
        ),
    )


def _format_task(task: TaskEffect | None) -> str:
    if task is None or task.mean is None:
        return MISSING if task is None else task.verdict
    effect = task.reason or format_signed(task.effect or 0.0, 1)
    is_decided = task.verdict in DECIDED or "diverged" in task.verdict
    return f"{format_signed(task.mean)} ({effect}){f' {task.verdict}' if is_decided else ''}"


def _format_estimate(estimate: Estimate) -> str:
    effect = format_signed(estimate.effect, 2)
    if estimate.interval is None:
        return effect
    low, high = (format_signed(end, 2) for end in estimate.interval)
    return f"{effect} [{low}, {high}]"


def _list_notes(pooled: Pooled) -> list[str]:
    notes = []
    num_arms = sum(arm.fixed is not None for arm in pooled.arms)
    for arm in pooled.arms:
        absent = [name for name in pooled.experiments if name not in arm.tasks]
        if absent:
            notes.append(f"Note: {arm.arm} is not in {', '.join(absent)}.")
        left_out = [f"{task.experiment} ({task.reason})" for task in arm.tasks.values() if task.reason]
        if left_out:
            notes.append(f"Note: {arm.arm}: without {', '.join(left_out)}.")
        if arm.level < st.ALPHA:
            notes.append(
                f"Note: {arm.arm}: verdict at level {arm.level:.2g}, the strictest of its experiments, one of which was"
                " not analysed at its planned seeds."
            )
        smallest = 2.0 ** (1 - arm.num_pairs)
        if arm.fixed and smallest * num_arms > st.ALPHA:
            notes.append(
                f"Note: {arm.arm}: with {arm.num_pairs} pairs and {format_plural(num_arms, 'arm')} the smallest"
                f" possible p Holm is {min(smallest * num_arms, 1.0):.2g}."
            )
    return notes
