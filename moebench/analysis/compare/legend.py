"""What the signs in a comparison's tables mean, in plain words."""

from moebench.analysis.compare import statistics as st
from moebench.analysis.compare.values import NON_CAUSAL, Comparison
from moebench.reporting.formatting import count

MARK_MEANINGS = {
    "≠FLOPs": "executed FLOPs per token differ from the baseline's by more than 2 % in training or in evaluation",
    "≠params": "total parameters differ from the baseline's by more than 2 %",
    "≠passes": "training runs each token through the model another number of times",
    "≠match": "its width was solved for another quantity (layout.match) than the comparison is by",
    "≠tokens": "trained on another number of tokens",
    "≠data": "trained on other data",
    "≠eval": "evaluated on another set or by another definition",
    NON_CAUSAL: "its routing sees later tokens, so its quality here is out of reach when generating",
    "best": "better than every other matched arm, each pair tested, p corrected as one family",
}


def legend(comparison: Comparison) -> tuple[str, ...]:
    """Explain every sign in the tables in plain words, with the power of the comparison."""
    marks = dict.fromkeys(mark for arm in comparison.arms for mark in arm.marks)
    return (
        *_statistics_legend(comparison),
        *_compute_legend(comparison),
        *_information_legend(comparison),
        *_parallel_legend(comparison),
        *(f"{mark}: {MARK_MEANINGS[mark]}." for mark in marks if mark in MARK_MEANINGS),
        *(f"Note: {note}." for note in comparison.notes),
    )


def _statistics_legend(comparison: Comparison) -> list[str]:
    lines = []
    if any(arm.num_diverged for arm in comparison.arms):
        lines.append(
            "diverged: the loss, a gradient or the final metric was not finite. Means and differences are of the other "
            "seeds, no fair sample: such a pair has no verdict, such an arm is never best."
        )
    if any(arm.interval for arm in comparison.arms):
        lines.append("± half of the 95 % t interval over seeds.")
    if any(arm.outside for arm in comparison.arms):
        lines.append(
            "Out of domain: over the domains that task.data.held_out_domains keeps out of training. All else is of the "
            "other domains, verdicts and expert loads too."
        )
    if comparison.num_comparisons:
        lines.append(
            "p Holm: p of the paired t-test, corrected for "
            f"{count(comparison.num_comparisons, 'comparison')}; better or worse means p Holm ≤ {st.ALPHA}. "
            "exact p: sign flips, 6 seeds or more, not corrected. seed SD: the difference over the SD "
            f"between seeds, as {_seeds(comparison)} estimate it. detectable: the smallest true difference that 4 of 5 "
            "repeats would show, the differences of all arms taken to vary alike."
        )
        together = "Each interval is one of 95 %, not all together. " if comparison.num_comparisons > 1 else ""
        lines.append(
            f"{together}Arms with rare bad seeds get false verdicts more often than {100 * st.ALPHA:.0f} % "
            "(docs/comparing.md)."
        )
    if any(difference.low_power for difference in comparison.differences):
        lines.append("low power: 3 to 5 seeds can miss any difference smaller than the detectable one.")
    if any(difference.verdict == "too few seeds" for difference in comparison.differences):
        lines.append(f"too few seeds: fewer than {st.MIN_SEEDS} describe and decide nothing.")
    return lines


def _seeds(comparison: Comparison) -> str:
    numbers = [len(difference.seeds) for difference in comparison.differences if difference.p is not None]
    fewest, most = min(numbers), max(numbers)
    return count(most, "seed") if fewest == most else f"{fewest} to {most} seeds"


def _compute_legend(comparison: Comparison) -> list[str]:
    if not any(arm.cost.get("experts_per_token") for arm in comparison.arms):
        return []
    return [
        "executed: forward FLOPs of the whole model and rows computed by experts, per token, mean over all steps of "
        "training (each pass counts) and on the test split; × baseline: training / evaluation. in training: share "
        "of assignments dropped, mean over all steps."
    ]


def _information_legend(comparison: Comparison) -> list[str]:
    if not any(arm.known for arm in comparison.arms):
        return []
    return ["what experts know: I(label; expert) / H(label), from 0 to 1, mean over expert layers."]


def _parallel_legend(comparison: Comparison) -> list[str]:
    if not any(arm.parallel for arm in comparison.arms):
        return []
    return [
        "all-to-all and waiting: shares of a step that was timed, in which every process waits for the slowest before "
        "each exchange. busiest: rows of the process with the most over the mean. memory: of the process with the most."
    ]
