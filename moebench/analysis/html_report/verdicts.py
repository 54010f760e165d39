"""The answer of an experiment in sentences that can be pasted into a paper."""

from dataclasses import dataclass

from moebench.analysis.compare.shown_arms import find_tone
from moebench.analysis.compare.values import BEST, Comparison
from moebench.analysis.compare.verdict import DECIDED


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """A sentence on one arm and the class of the style sheet for its verdict."""

    arm: str
    tone: str
    text: str


def describe_arms(comparison: Comparison) -> tuple[Sentence, ...]:
    """Return a sentence for each arm but the baseline: decided ones first, then by their distance from it."""
    order = {"good": 0, "bad": 1, "same": 2, "open": 3, "warn": 4}
    sign = 1 if comparison.lower_is_better else -1
    pairs = sorted(
        comparison.differences,
        key=lambda pair: (order[find_tone(comparison, pair.arm)], sign * (pair.mean or 0.0)),
    )
    return tuple(
        Sentence(arm=pair.arm, tone=find_tone(comparison, pair.arm), text=comparison.describe_difference(pair.arm))
        for pair in pairs
    )


def describe_outcome(comparison: Comparison) -> str:
    """Return the answer to the question in one sentence: the best arm, else how many are shown to differ."""
    best = next((arm for arm in comparison.arms if BEST in arm.marks), None)
    if best is not None:
        return f"{best.arm} is the best of {len(comparison.arms)} arms."
    verdicts = [difference.verdict for difference in comparison.differences]
    if not verdicts:
        return f"{comparison.baseline} is the only arm."
    counts = {verdict: verdicts.count(verdict) for verdict in DECIDED}
    parts = [f"{count} {verdict}" for verdict, count in counts.items() if count]
    rest = len(verdicts) - sum(counts.values())
    if not parts:
        others = "The other arm is not" if rest == 1 else f"None of the {rest} other arms is"
        return f"{others} shown to differ from {comparison.baseline}."
    compared = f"Compared with {comparison.baseline}: {', '.join(parts)}"
    return f"{compared}, {rest} without a verdict." if rest else f"{compared}."
