"""The legend of a comparison: what the columns and marks in its tables mean."""

from moebench.analysis import statistics as st
from moebench.analysis.compare.design_report import explain_design
from moebench.analysis.compare.matching import BY_TRAINING_FLOPS
from moebench.analysis.compare.sentences import describe_margin
from moebench.analysis.compare.trivial_rows import explain_trivial_baselines
from moebench.analysis.compare.values import NON_CAUSAL, Comparison
from moebench.metrics import EXECUTED
from moebench.reporting.formatting import format_plural
from moebench.reporting.metrics import explain_metrics

MARK_MEANINGS = {
    "≠FLOPs": "executed forward FLOPs per token are more than 2 % from the baseline's, in training or in evaluation",
    BY_TRAINING_FLOPS: "trained on another number of tokens than the baseline, for its FLOPs of training within 2 %",
    "≠params": "total parameters differ from the baseline's by more than 2 %",
    "≠passes": "training runs each token through the model another number of times",
    "≠match": "its width was solved for another quantity (layout.match) than the comparison is by",
    "≠tokens": "trained on another number of tokens",
    "≠data": "trained on other data",
    "≠eval": "evaluated on another set or by another definition",
    NON_CAUSAL: "its routing sees later tokens, so its quality here is out of reach when generating",
    "best": "better than every other matched arm, each pair tested, p corrected as one family",
}


def build_legend(comparison: Comparison) -> tuple[str, ...]:
    """Return an explanation of every column and mark that the tables of this comparison have."""
    marks = dict.fromkeys(mark for arm in comparison.arms for mark in arm.marks)
    return (
        *_explain_means(comparison),
        *explain_trivial_baselines(comparison),
        *_explain_statistics(comparison),
        *explain_design(comparison),
        *_explain_metrics(comparison),
        *(f"{mark}: {MARK_MEANINGS[mark]}." for mark in marks if mark in MARK_MEANINGS),
    )


def _explain_means(comparison: Comparison) -> list[str]:
    lines = []
    if any(arm.num_diverged for arm in comparison.arms):
        lines.append(
            "diverged: the loss, a gradient or the final metric was not finite, or a spike ended the run "
            "(train.spike_policy=stop). Means and differences are of the other seeds, a biased sample: such a pair has "
            "no verdict, such an arm is never best."
        )
    if any(arm.interval for arm in comparison.arms):
        lines.append("± half of the 95 % t interval over seeds.")
    if any(arm.out_of_domain for arm in comparison.arms):
        lines.append(
            "Out of domain: over the domains that task.data.held_out_domains keeps out of training. All else is of the "
            "other domains, verdicts and expert loads too."
        )
    return lines


def _explain_statistics(comparison: Comparison) -> list[str]:
    lines = []
    if comparison.num_comparisons:
        num_comparisons = format_plural(comparison.num_comparisons, "comparison")
        lines += [
            f"p: of the paired t-test. {explain_metrics('p_pooled')} p Holm: the larger of both, corrected for"
            f" {num_comparisons}; better or worse means p Holm ≤ {_describe_level(comparison)}."
            f" {explain_metrics('p_exact')} {explain_metrics('smallest_detectable')}",
            f"all together: intervals that hold for {num_comparisons} at once in 95 % of repeats; ± elsewhere is one"
            f" interval by itself. {explain_metrics('effect_sd')} {_explain_equivalence(comparison)}",
            describe_limit(comparison.num_comparisons),
        ]
    if any(difference.low_power for difference in comparison.differences):
        lines.append("low power: 3 to 5 seeds can miss any difference smaller than the detectable one.")
    if any(difference.verdict == "too few seeds" for difference in comparison.differences):
        lines.append(f"too few seeds: fewer than {st.MIN_SEEDS} describe and decide nothing.")
    return lines


def _explain_equivalence(comparison: Comparison) -> str:
    if not comparison.num_equivalence_tests:
        return f"Equivalence within {describe_margin(comparison)} needs {st.EQUIVALENCE_SEEDS} seeds."
    return (
        f"{explain_metrics('p_equivalence_holm')} equivalent means p TOST ≤ {_describe_level(comparison)} and no"
        " shown difference."
    )


def _describe_level(comparison: Comparison) -> str:
    levels = [difference.level for difference in comparison.differences if difference.p is not None]
    return f"{st.ALPHA}" if all(level == st.ALPHA for level in levels) else "the level in the note"


def describe_limit(num_comparisons: int) -> str:
    """Return in how many tables a false verdict must be expected if a few seeds are far worse than the others."""
    case, difference, equivalence = "the baseline or one of two arms has rare bad seeds", "up to 8 %", "up to 12 %"
    if num_comparisons == 1:
        case, difference, equivalence = "a single arm has rare bad seeds", "9 to 23 %", "12 to 28 %"
    return (
        f"Limit: where {case}, {difference} of tables claim a false difference and {equivalence} a false equivalence,"
        " and intervals cover less (docs/statistics.md)."
    )


def _explain_metrics(comparison: Comparison) -> list[str]:
    lines = []
    if any(arm.cost.get("experts_per_token") for arm in comparison.arms):
        dropped = explain_metrics("load/train_drop_rate")
        lines.append(f"executed: {EXECUTED}; × baseline: training / evaluation. {dropped}")
    if any(arm.information for arm in comparison.arms):
        lines.append(explain_metrics("load/information/KIND"))
    if any(arm.mfu is not None for arm in comparison.arms):
        lines.append(explain_metrics("mfu"))
    if any(arm.parallel for arm in comparison.arms):
        names = ("all_to_all_share", "wait_share", "rank_load_max", "peak_memory_gib")
        lines.append(explain_metrics(*(f"parallel/{name}" for name in names)))
    return lines
