"""The answer of an experiment in sentences that can be pasted into a paper."""

from dataclasses import dataclass

from moebench.analysis.compare.shown_arms import find_tone
from moebench.analysis.compare.values import BEST, Comparison, Difference
from moebench.reporting.formatting import format_number, format_p, format_plural, format_signed


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """A sentence on one arm and the class of the style sheet for its verdict."""

    arm: str
    tone: str
    text: str


def describe_arms(comparison: Comparison) -> tuple[Sentence, ...]:
    """Return a sentence for each arm but the baseline: decided ones first, then by their distance from it."""
    order = {"good": 0, "bad": 1, "open": 2, "warn": 3}
    sign = 1 if comparison.lower_is_better else -1
    pairs = sorted(
        comparison.differences,
        key=lambda pair: (order[find_tone(comparison, pair.arm)], sign * (pair.mean or 0.0)),
    )
    return tuple(
        Sentence(arm=pair.arm, tone=find_tone(comparison, pair.arm), text=describe_difference(comparison, pair))
        for pair in pairs
    )


def describe_difference(comparison: Comparison, difference: Difference) -> str:
    """Return the verdict on one arm as a sentence, with difference, interval, seeds and correction."""
    metric, baseline = comparison.metric.replace("_", " "), comparison.baseline
    if difference.mean is None:
        return f"{difference.arm}: {comparison.describe_verdict(difference.arm)}; no seed in common with {baseline}."
    interval = ""
    if difference.interval:
        low, high = (format_signed(bound) for bound in difference.interval)
        interval = f", 95 % interval {low} to {high}"
    seeds = format_plural(len(difference.seeds), "paired seed")
    amount = f"{format_signed(difference.mean)} {metric}{interval}"
    p = format_p(difference.p_holm)
    tested = f"paired t test, p {p if p.startswith('<') else f'= {p}'} after Holm's correction"
    tested = f"{seeds}, {tested} for {format_plural(comparison.num_comparisons, 'comparison')}"
    if difference.verdict in ("better", "worse"):
        return f"{difference.arm} is {difference.verdict} than {baseline}: {amount} ({tested})."
    if difference.verdict == "no difference shown":
        missed = ""
        if difference.smallest_detectable:
            missed = (
                f" A difference of {format_number(difference.smallest_detectable)} would be found in 4 of 5 repeats."
            )
        return f"No difference is shown between {difference.arm} and {baseline}: {amount} ({tested}).{missed}"
    return f"{difference.arm}: {comparison.describe_verdict(difference.arm)}, so no claim; {amount} ({seeds})."


def describe_outcome(comparison: Comparison) -> str:
    """Return the answer to the question in one sentence: the best arm, else how many are shown to differ."""
    best = next((arm for arm in comparison.arms if BEST in arm.marks), None)
    if best is not None:
        return f"{best.arm} is the best of {len(comparison.arms)} arms."
    verdicts = [difference.verdict for difference in comparison.differences]
    if not verdicts:
        return f"{comparison.baseline} is the only arm."
    counts = {verdict: verdicts.count(verdict) for verdict in ("better", "worse")}
    rest = len(verdicts) - sum(counts.values())
    if not any(counts.values()):
        others = "The other arm is not" if rest == 1 else f"None of the {rest} other arms is"
        return f"{others} shown to differ from {comparison.baseline}."
    parts = [f"{count} {verdict}" for verdict, count in counts.items() if count]
    of_all = f"Of {format_plural(len(verdicts), 'other arm')}, {' and '.join(parts)} than {comparison.baseline}"
    return f"{of_all}; {rest} undecided." if rest else f"{of_all}."
