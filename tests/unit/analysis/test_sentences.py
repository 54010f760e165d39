"""Verdicts as sentences, and the lines below the table."""

import json
from dataclasses import replace

import pytest
from support.comparison_runs import DENSE, fail_seeds, list_cells, make_cost, make_result, make_results

from moebench.analysis.compare.comparison import compare
from moebench.analysis.compare.report import build_report
from moebench.analysis.compare.sentences import MAX_SENTENCES, format_seeds, list_verdicts
from moebench.analysis.compare.values import BITS_PER_BYTE, Comparison
from moebench.runs.result import RunResult

UNIT = "bits per byte, 95 % interval"
SEEDS = "paired over seeds 0-4, n = 5"
HOLM = "Holm over 5 comparisons"


def compare_all(results: list[RunResult], margin: float = 0.005) -> Comparison:
    metric = replace(BITS_PER_BYTE, margin=margin)
    return compare(results, expected=list_cells(results), baseline="dense", metric=metric)


def test_each_verdict_has_its_sentence():
    results = make_results({"dense": 0, "a": -0.02, "b": 0.02, "c": 0.0005, "d": -0.008})
    results += [make_result("e", seed, DENSE[seed] + d) for seed, d in enumerate((-0.02, 0.02, 0.0, 0.015, -0.01))]
    comparison = compare_all(results)
    assert [comparison.describe_difference(arm) for arm in ("dense", "a", "b", "c", "d", "e")] == [
        "",
        f"a is better than dense: −0.0200 {UNIT} [−0.0220, −0.0180] ({SEEDS}, p < 0.001, {HOLM}).",
        f"b is worse than dense: +0.0200 {UNIT} [+0.0180, +0.0220] ({SEEDS}, p < 0.001, {HOLM}).",
        f"c is equivalent to dense within ±0.0100 (0.5 %): +0.0005 {UNIT} [−0.0015, +0.0025] ({SEEDS}, TOST p < 0.001,"
        f" {HOLM}).",
        f"d is better than dense: −0.0080 {UNIT} [−0.0100, −0.0060] ({SEEDS}, p = 0.001, {HOLM}).",
        f"e is not shown to differ from dense or to be equivalent within ±0.0100 (0.5 %): +0.0010 {UNIT} [−0.0198,"
        f" +0.0218] ({SEEDS}, p = 1.000 and TOST p = 0.443, {HOLM}).",
    ]
    within = compare_all(make_results({"dense": 0, "a": -0.008}), 0.01).describe_difference("a")
    assert within == (
        f"a is better than dense, by less than the margin of ±0.0200 (1 %): −0.0080 {UNIT} [−0.0100, −0.0060] ({SEEDS},"
        " p < 0.001, 1 comparison)."
    )


def test_a_look_at_another_level_names_it():
    comparison = compare_all(make_results({"dense": 0, "a": -0.02}))
    (difference,) = comparison.differences
    early = replace(comparison, differences=(replace(difference, level=0.0031),))
    assert early.describe_difference("a").endswith("n = 5, p < 0.001, 1 comparison, level 0.0031).")
    assert "p Holm ≤ the level in the note" in " ".join(build_report(early).notes)
    assert "p Holm ≤ 0.05." in " ".join(build_report(comparison).notes)


def test_without_a_verdict_the_sentence_says_why():
    results = make_results({"dense": 0, "a": -0.02, "b": 0.02})
    unequal = [replace(r, cost=make_cost(4e6)) if r.arm == "b" else r for r in results]
    assert compare_all(unequal).describe_difference("b") == (
        f"b is not matched with dense (≠FLOPs): +0.0200 {UNIT} [+0.0180, +0.0220] ({SEEDS})."
    )
    diverged = compare_all(fail_seeds(results, "a", (1, 3), "diverged")).describe_difference("a")
    assert diverged.startswith("a against dense has no verdict, 2 of 5 diverged: −0.0190 bits per byte")
    assert "paired over seeds 0, 2, 4, n = 3)" in diverged
    few = [r for r in results if r.seed < 2]
    assert compare_all(few).describe_difference("a") == (
        "a against dense has no verdict, 2 seeds in common and 3 needed: −0.0200 bits per byte (paired over seeds 0-1,"
        " n = 2)."
    )
    none = compare([r for r in results if r.arm != "a"], expected=list_cells(results), baseline="dense")
    assert none.describe_difference("a") == "a against dense has no verdict, 0 seeds in common and 3 needed."


def test_sentences_stand_below_the_table_and_in_json():
    results = make_results({"dense": 0, "a": -0.02})
    results += [make_result("e", seed, DENSE[seed] + d) for seed, d in enumerate((-0.02, 0.02, 0.0, 0.015, -0.01))]
    report = build_report(compare_all(results))
    sentence = compare_all(results).describe_difference("a")
    assert report.tables[0].notes == (sentence, "Undecided against dense: e.")
    values = json.loads(report.to_json())
    assert values["arms"]["a"]["difference"]["sentence"] == sentence
    assert values["margin"] == {"share_of_baseline": 0.005, "value": pytest.approx(0.01)}


def test_a_table_of_many_arms_has_the_first_sentences_alone():
    offsets = {"dense": 0.0} | {f"arm {number}": 0.02 + 0.001 * number for number in range(MAX_SENTENCES + 3)}
    lines = list_verdicts(compare_all(make_results(offsets)))
    assert len(lines) == MAX_SENTENCES + 1
    assert lines[-1] == "3 more verdicts: in the table, and as sentences with --json."


@pytest.mark.parametrize(
    ("seeds", "text"), [((0, 1, 2), "0-2"), ((3,), "3"), ((0, 2, 3, 4, 7), "0, 2-4, 7"), ((0, 5, 6), "0, 5-6")]
)
def test_consecutive_seeds_are_a_range(seeds, text):
    assert format_seeds(seeds) == text


def test_a_warning_names_the_seeds_that_are_far_worse():
    # Each arm has one bad seed of five; skewness 1.5 each.
    bad = {"dense": 3, "a": 1, "b": 4, "c": 0}
    for sign, lower_is_better in ((1, True), (-1, False)):
        results = [
            make_result(arm, seed, 2 + sign * (0.01 * seed % 3 * 0.01 + (1.0 if seed == bad_seed else 0)))
            for arm, bad_seed in bad.items()
            for seed in range(5)
        ]
        metric = replace(BITS_PER_BYTE, lower_is_better=lower_is_better)
        comparison = compare(results, expected=list_cells(results), baseline="dense", metric=metric)
        assert comparison.rare_bad_seeds is not None
        assert set(comparison.rare_bad_seeds.seeds) <= set(bad.items())
        note = build_report(comparison).caveats[0]
        assert note.startswith("rare bad seeds: values scatter further to the bad side than to the good (most: ")
        assert comparison.to_dict()["rare_bad_seeds"]["p"] < 0.05
        other_way = replace(metric, lower_is_better=not lower_is_better)
        assert compare(results, expected=list_cells(results), baseline="dense", metric=other_way).rare_bad_seeds is None


def test_without_three_common_seeds_there_is_no_warning():
    results = [make_result("dense", seed, 2.0 + seed**3) for seed in range(2)]
    assert compare(results, expected=list_cells(results), baseline="dense").rare_bad_seeds is None
    assert compare([], expected=list_cells(results), baseline="dense").rare_bad_seeds is None
