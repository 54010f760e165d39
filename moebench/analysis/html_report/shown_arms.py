"""Which arms the charts of a report show, and in which colour."""

from moebench.analysis.compare.values import ArmSummary, Comparison

MAX_ARMS = 12
"""Charts of more arms show the baseline, the best and the worst; tables and the chart of differences show all."""
TONES = {"better": "good", "worse": "bad", "diverged": "warn", "not matched": "warn"}


def select_arms(comparison: Comparison) -> list[ArmSummary]:
    """Return the arms that charts show, in the order of the grid: all, or of more than 12 the best and the worst."""
    if len(comparison.arms) <= MAX_ARMS:
        return list(comparison.arms)
    others = [(arm.mean, arm.arm) for arm in comparison.arms if arm.mean is not None and arm.arm != comparison.baseline]
    ranked = [name for _, name in sorted(others, reverse=not comparison.lower_is_better)]
    num_best = MAX_ARMS // 2
    names = {comparison.baseline, *ranked[:num_best], *ranked[num_best:][-(MAX_ARMS - 1 - num_best) :]}
    return [arm for arm in comparison.arms if arm.arm in names]


def describe_selection(comparison: Comparison) -> str:
    """Return a sentence on the arms that charts leave out; empty where they show all."""
    num_shown, num_arms = len(select_arms(comparison)), len(comparison.arms)
    if num_shown == num_arms:
        return ""
    return (
        f"Shown: {comparison.baseline}, the best {MAX_ARMS // 2} and the worst of {num_arms} arms; the tables have all."
    )


def find_tone(comparison: Comparison, arm: str) -> str:
    """Return the class of the style sheet for the verdict on an arm."""
    difference = comparison.find_difference(arm)
    return "baseline" if difference is None else TONES.get(difference.verdict, "open")
