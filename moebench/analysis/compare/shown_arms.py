"""Which arms charts show, and in which tone."""

from collections.abc import Mapping

from moebench.analysis.compare.values import ArmSummary, Comparison

MAX_ARMS = 12
"""Charts of more arms show the baseline, the best and the worst; tables show all."""
NUM_BEST = 6
TONES = {"better": "good", "worse": "bad", "equivalent": "same", "diverged": "warn", "not matched": "warn"}


def select_names(values: Mapping[str, float], baseline: str | None, *, lower_is_better: bool) -> set[str]:
    """Return the names of at most 12 arms: all, or the baseline, the best six and the worst of the others."""
    if len(values) <= MAX_ARMS:
        return set(values)
    kept = {baseline} & set(values)
    others = [(value, name) for name, value in values.items() if name not in kept]
    ranked = [name for _, name in sorted(others, reverse=not lower_is_better)]
    return {*filter(None, kept), *ranked[:NUM_BEST], *ranked[len(kept) + NUM_BEST - MAX_ARMS :]}


def select_arms(comparison: Comparison) -> list[ArmSummary]:
    """Return the arms that charts show, in the order of the grid."""
    if len(comparison.arms) <= MAX_ARMS:
        return list(comparison.arms)
    means = {arm.arm: arm.mean for arm in comparison.arms if arm.mean is not None}
    names = select_names(means, comparison.baseline, lower_is_better=comparison.lower_is_better)
    return [arm for arm in comparison.arms if arm.arm in names]


def describe_selection(num_shown: int, num_arms: int) -> str:
    """Return a sentence on the arms that a chart leaves out; empty where it shows all."""
    return f"Shown: {num_shown} of {num_arms} arms, the best and the worst." if num_shown < num_arms else ""


def find_tone(comparison: Comparison, arm: str) -> str:
    """Return the tone of the verdict on an arm: good, bad, same, warn, open (undecided) or baseline."""
    difference = comparison.find_difference(arm)
    return "baseline" if difference is None else TONES.get(difference.verdict, "open")
