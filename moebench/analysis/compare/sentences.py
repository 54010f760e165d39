"""A verdict as a sentence that can be pasted into a paper: arms, difference, interval, seeds, test, correction."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from moebench.analysis import statistics as st
from moebench.analysis.compare.verdict import DECIDED
from moebench.reporting.formatting import format_number, format_p, format_plural, format_signed

if TYPE_CHECKING:
    from moebench.analysis.compare.values import Comparison, Difference

MAX_SENTENCES = 12
"""Below a table; JSON has all."""


def describe_difference(comparison: "Comparison", arm: str) -> str:
    """Return the verdict on an arm with its numbers, in one sentence; empty for the baseline."""
    difference = comparison.find_difference(arm)
    if difference is None:
        return ""
    if difference.mean is None:
        return f"{_describe_obstacle(comparison, difference)}."
    return f"{_state(comparison, difference)}: {_describe_numbers(comparison, difference)}."


def list_verdicts(comparison: "Comparison") -> tuple[str, ...]:
    """Return the sentences of the first arms with a verdict, and a line that names the undecided ones."""
    undecided = [pair.arm for pair in comparison.differences if pair.verdict == "undecided"]
    decided = [pair.arm for pair in comparison.differences if pair.verdict in DECIDED]
    lines = [describe_difference(comparison, arm) for arm in decided[:MAX_SENTENCES]]
    if len(decided) > MAX_SENTENCES:
        lines.append(f"{len(decided) - MAX_SENTENCES} more verdicts: in the table, and as sentences with --json.")
    if undecided:
        lines.append(f"Undecided against {comparison.baseline}: {', '.join(undecided)}.")
    return tuple(lines)


def describe_margin(comparison: "Comparison") -> str:
    """Return the margin of equivalence in the unit of the metric and as a share: ±0.0255 (1 %); or the share alone."""
    share = f"{100 * comparison.margin:.3g} %"
    value = comparison.margin_value
    return f"±{share}" if value is None else f"±{format_number(value)} ({share})"


def _state(comparison: "Comparison", difference: "Difference") -> str:
    arm, baseline, margin = difference.arm, comparison.baseline, describe_margin(comparison)
    match difference.verdict:
        case "better" | "worse":
            within = f", by less than the margin of {margin}" if difference.is_within_margin else ""
            return f"{arm} is {difference.verdict} than {baseline}{within}"
        case "equivalent":
            return f"{arm} is equivalent to {baseline} within {margin}"
        case "undecided":
            equivalent = f" or to be equivalent within {margin}" if difference.p_equivalence is not None else ""
            return f"{arm} is not shown to differ from {baseline}{equivalent}"
    return _describe_obstacle(comparison, difference)


def _describe_obstacle(comparison: "Comparison", difference: "Difference") -> str:
    """Return why there is no verdict."""
    arm, baseline = difference.arm, comparison.baseline
    if difference.verdict == "diverged":
        return f"{arm} against {baseline} has no verdict, {comparison.describe_verdict(arm)}"
    if difference.verdict == "not matched":
        marks = next(summary.marks for summary in comparison.arms if summary.arm == arm)
        unequal = ", ".join(mark for mark in marks if mark.startswith("≠"))
        return f"{arm} is not matched with {baseline}" + (f" ({unequal})" if unequal else "")
    number = format_plural(len(difference.seeds), "seed")
    return f"{arm} against {baseline} has no verdict, {number} in common and {st.MIN_SEEDS} needed"


def _describe_numbers(comparison: "Comparison", difference: "Difference") -> str:
    mean = f"{format_signed(difference.mean or 0.0)} {comparison.metric.replace('_', ' ')}"
    if difference.interval:
        low, high = (format_signed(bound) for bound in difference.interval)
        mean += f", 95 % interval [{low}, {high}]"
    seeds = difference.seeds
    noun = "seed" if len(seeds) == 1 else "seeds"
    design = f"paired over {noun} {format_seeds(seeds)}, n = {len(seeds)}"
    tests = _list_tests(comparison, difference)
    if tests and difference.level < st.ALPHA:
        tests.append(f"level {difference.level:.2g}")
    return f"{mean} ({', '.join([design, *tests])})"


def _list_tests(comparison: "Comparison", difference: "Difference") -> list[str]:
    """Return the corrected p values that the verdict rests on, each followed by its correction."""
    verdict, tests = difference.verdict, []
    if verdict in ("better", "worse", "undecided") and difference.p_holm is not None:
        tests.append((_format_equation("p", difference.p_holm), comparison.num_comparisons))
    if verdict in ("equivalent", "undecided") and difference.p_equivalence_holm is not None:
        equation = _format_equation("TOST p", difference.p_equivalence_holm)
        tests.append((equation, comparison.num_equivalence_tests))
    if len(tests) == 2 and tests[0][1] == tests[1][1]:
        tests = [(" and ".join(equation for equation, _ in tests), tests[0][1])]
    corrections = [format_plural(number, "comparison") for _, number in tests]
    return [
        f"{equation}, Holm over {correction}" if number > 1 else f"{equation}, {correction}"
        for (equation, number), correction in zip(tests, corrections, strict=True)
    ]


def _format_equation(name: str, p: float) -> str:
    value = format_p(p)
    return f"{name} {value[0]} {value[1:]}" if value.startswith("<") else f"{name} = {value}"


def format_seeds(seeds: Sequence[int]) -> str:
    """Format seeds in ascending order, consecutive ones as a range: 0-4, 7."""
    starts = [0, *(index for index, (left, right) in enumerate(pairwise(seeds), 1) if right != left + 1)]
    ends = [*(start - 1 for start in starts[1:]), len(seeds) - 1]
    runs = ((seeds[start], seeds[end]) for start, end in zip(starts, ends, strict=True))
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
