"""Differences, intervals, verdicts and the best arm."""

import json
from dataclasses import replace

import pytest
from support.comparison_runs import (
    COST,
    DENSE,
    fail_seeds,
    list_cells,
    make_result,
    make_results,
    summary_of,
    with_own_jitter,
)

from moebench.analysis.compare.comparison import compare
from moebench.analysis.compare.values import BITS_PER_BYTE
from moebench.errors import UsageError

HIGHER = replace(BITS_PER_BYTE, lower_is_better=False)


def test_difference_by_hand():
    results = make_results({"dense": 0, "switch": -0.01})
    comparison = compare(results, expected=list_cells(results), baseline="dense")
    # dense: mean 2.0, SD 0.0158114, t(.975, 4) = 2.776445 -> half 2.776445 * 0.0158114 / sqrt 5 = 0.019632
    dense = summary_of(comparison, "dense")
    assert dense.mean == pytest.approx(2.0)
    assert dense.interval == pytest.approx((2 - 0.019632, 2 + 0.019632), abs=1e-6)
    # difference: -0.01 + jitter: mean -0.01, SD 0.00158114 -> half 0.0019632; t = -14.142 -> p = .000145
    (difference,) = comparison.differences
    assert difference.mean == pytest.approx(-0.01)
    assert difference.interval == pytest.approx((-0.0119632, -0.0080368), abs=1e-6)
    assert difference.p == pytest.approx(0.000145, abs=1e-6)
    assert difference.p_holm == difference.p  # a family of one
    assert difference.verdict == "better"
    assert difference.low_power
    # detectable: 2.0901 SDs for n = 5 (test_statistics simulates it), times the SD of the differences
    assert difference.smallest_detectable == pytest.approx(2.0901 * 0.00158114, rel=1e-3)
    assert summary_of(comparison, "switch").marks == ("best",)
    assert summary_of(comparison, "dense").domains == pytest.approx({"code": 1.5, "law": 2.5})


def test_higher_is_better_turns_the_verdict():
    results = make_results({"dense": 0, "switch": -0.01})
    comparison = compare(results, expected=list_cells(results), baseline="dense", metric=HIGHER)
    assert comparison.differences[0].verdict == "worse"
    assert {arm.arm: arm.marks for arm in comparison.arms} == {"dense": ("best",), "switch": ()}


def test_holm_corrects_over_the_arms():
    results = make_results({"dense": 0, "a": -0.01, "b": 0.01, "c": 0.0005})
    comparison = compare(results, expected=list_cells(results), baseline="dense")
    by_arm = {difference.arm: difference for difference in comparison.differences}
    # two p of .000145 share the front: 3 * p for both; c: mean .0005, t = 0.7071, 4 df -> p = .5185, times 1
    assert by_arm["a"].p_holm == pytest.approx(3 * 0.000145, abs=3e-6)
    assert by_arm["c"].p_holm == pytest.approx(0.5185, abs=1e-4)
    # c is also shown to lie within the margin of 1 %
    assert [by_arm[arm].verdict for arm in "abc"] == ["better", "worse", "equivalent"]
    assert comparison.num_comparisons == 3


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_fewer_than_three_seeds_decide_nothing(num_seeds):
    results = make_results({"dense": 0, "switch": -1.0}, num_seeds)
    comparison = compare(results, expected=list_cells(results), baseline="dense")
    (difference,) = comparison.differences
    assert difference.verdict == "too few seeds"
    assert (difference.p, difference.interval, difference.smallest_detectable) == (None, None, None)
    assert difference.mean == pytest.approx(-1, abs=0.002)
    assert all(arm.marks == () and arm.interval is None for arm in comparison.arms)


def test_best_is_better_than_every_other_arm():
    # b - a: -0.05 + (.001, -.001, .002, 0, -.002): t = -70.7, far below .05 even with the other pair corrected
    b = [make_result("b", seed, DENSE[seed] - 0.06 + d) for seed, d in enumerate((0.001, -0.001, 0.002, 0, -0.002))]
    results = make_results({"dense": 0, "a": -0.01}) + b
    comparison = compare(results, expected=list_cells(results), baseline="dense")
    assert [difference.verdict for difference in comparison.differences] == ["better", "better"]
    assert {arm.arm: arm.marks for arm in comparison.arms} == {"dense": (), "a": (), "b": ("best",)}


def test_two_good_arms_that_are_near_have_no_best():
    b = [make_result("b", seed, DENSE[seed] - 0.0105 + d) for seed, d in enumerate((0.002, -0.002, 0.003, 0, -0.003))]
    results = make_results({"dense": 0, "a": -0.01}) + b
    comparison = compare(results, expected=list_cells(results), baseline="dense")
    assert [difference.verdict for difference in comparison.differences] == ["better", "better"]
    assert all(arm.marks == () for arm in comparison.arms)
    assert "b has the best mean, but is not shown to be better than a" in comparison.notes


def test_a_better_arm_is_not_best_while_another_has_a_better_mean():
    results = make_results({"dense": 0, "a": -0.01}) + [
        make_result("b", seed, DENSE[seed] + d) for seed, d in enumerate((-0.5, 0.4, -0.3, 0.2, -0.1))
    ]
    results += make_results({"c": 0.01, "d": 0.01})  # without them half of the table's arms would be as noisy as b
    comparison = compare(results, expected=list_cells(results), baseline="dense")
    assert [difference.verdict for difference in comparison.differences] == ["better", "undecided", "worse", "worse"]
    assert all(arm.marks == () for arm in comparison.arms)
    assert "b has the best mean, but is not shown to be better than dense, a, c, d" in comparison.notes


def test_a_non_causal_arm_is_marked_and_not_best():
    results = make_results({"dense": 0, "expert_choice": -0.01})
    results = [replace(r, marks=("non-causal",)) if r.arm == "expert_choice" else r for r in results]
    comparison = compare(results, expected=list_cells(results), baseline="dense")
    assert summary_of(comparison, "expert_choice").marks == ("non-causal",)
    assert comparison.differences[0].verdict == "better"


def test_a_half_finished_grid_is_compared_over_common_seeds():
    results = make_results({"dense": 0, "switch": -0.01, "top_p": 0.01})
    comparison = compare(results[:-2], expected=list_cells(results), baseline="dense")
    assert [(cell.arm, cell.seed) for cell in comparison.missing] == [("switch", 4), ("top_p", 4)]
    assert [difference.seeds for difference in comparison.differences] == [(0, 1, 2, 3)] * 2
    assert summary_of(comparison, "dense").seeds == (0, 1, 2, 3, 4)
    assert comparison.notes[0] == "2 of 15 cells have no result yet: this is an early look"


def test_before_the_first_result_everything_is_missing():
    results = make_results({"dense": 0, "switch": -0.01})
    comparison = compare([], expected=list_cells(results), baseline="dense")
    assert len(comparison.missing) == 10
    assert [arm.mean for arm in comparison.arms] == [None, None]
    assert comparison.differences[0].verdict == "too few seeds"
    json.dumps(comparison.to_dict(), allow_nan=False)


def test_results_of_another_grid_are_named_not_used():
    results = make_results({"dense": 0, "switch": -0.01})
    stranger = make_result("switch", 9, 0.1, id="stranger")
    comparison = compare([*results, stranger], expected=list_cells(results), baseline="dense")
    assert summary_of(comparison, "switch").seeds == (0, 1, 2, 3, 4)
    assert any("stranger" in note for note in comparison.notes)


def test_unknown_baseline_metric_and_double_cells_are_refused():
    results = make_results({"dense": 0, "switch": -0.01})
    with pytest.raises(UsageError, match=r"baseline: 'swich' .*Did you mean 'switch'.*dense, switch"):
        compare(results, expected=list_cells(results), baseline="swich")
    with pytest.raises(UsageError, match=r"metric: 'bits' .*bits_per_byte"):
        compare(results, expected=list_cells(results), baseline="dense", metric=replace(BITS_PER_BYTE, name="bits"))
    with pytest.raises(UsageError, match="same seed twice"):
        compare(results, expected=[*list_cells(results), ("dense", 0, "other")], baseline="dense")


def test_two_arms_of_one_cell_are_refused():
    # Under a second label switch would make Holm's family larger, and tie with itself for the best.
    results = make_results({"dense": 0, "switch": -0.01})
    copies = [("again", seed, f"switch-{seed}") for seed in range(5)]
    message = r"arms 'switch' \(seed 0\) and 'again' \(seed 0\) are the same cell, switch-0"
    with pytest.raises(UsageError, match=message):
        compare(results, expected=[*list_cells(results), *copies], baseline="dense")
    with pytest.raises(UsageError, match="dense-0: 2 results of one cell are given"):
        compare([*results, replace(results[0], seed=7)], expected=list_cells(results), baseline="dense")


def test_load_speed_and_cost_are_averaged_over_seeds():
    results = make_results({"dense": 0, "switch": -0.01})
    results = [
        replace(
            r,
            metrics=r.metrics | {"load/cv": 0.1 * (1 + r.seed)},
            throughput={"tokens_per_s": 1.0 if r.seed == 0 else 500.0 + r.seed},
        )
        if r.arm == "switch"
        else r
        for r in results
    ]
    switch = summary_of(compare(results, expected=list_cells(results), baseline="dense"), "switch")
    assert switch.load == pytest.approx({"cv": 0.3})
    # medians: switch of {1, 501, 502, 503, 504} = 502; dense of {1000 ... 1004} = 1002
    assert switch.throughput_share == pytest.approx(502 / 1002)
    assert switch.cost == COST


def test_equal_differences_for_every_seed_are_noted():
    results = make_results({"dense": 0}) + [make_result("copy", seed, value - 0.25) for seed, value in enumerate(DENSE)]
    comparison = compare(results, expected=list_cells(results), baseline="dense")
    assert comparison.differences[0].verdict == "undecided"
    assert any("the same difference for every seed" in note for note in comparison.notes)


def test_to_dict_is_json_with_the_promised_keys():
    results = make_results({"dense": 0, "switch": -0.01})
    comparison = json.loads(json.dumps(compare(results, expected=list_cells(results), baseline="dense").to_dict()))
    assert comparison["arms"]["dense"]["difference"] is None
    switch = comparison["arms"]["switch"]
    assert set(switch) == {
        "bits_per_byte", "cost", "difference", "domains", "flops_vs_baseline",
        "out_of_domain", "load", "marks", "parallel", "runs", "throughput"
    }  # fmt: skip
    assert set(switch["bits_per_byte"]["seeds"]) == {"0", "1", "2", "3", "4"}
    assert switch["difference"]["verdict"] == "better"
    assert set(switch["difference"]) == {
        "baseline", "effect_interval", "effect_sd", "interval", "low_power", "mean", "p", "p_equivalence",
        "level", "p_equivalence_holm", "p_exact", "p_holm", "p_pooled", "seeds", "sentence", "simultaneous_interval",
        "smallest_detectable", "verdict",
    }  # fmt: skip
    assert switch["runs"] == {"done": 5, "failed": 0, "diverged": 0, "missing": 0}


def test_a_copy_of_the_baseline_does_not_make_differences_easy_to_detect():
    results = with_own_jitter(make_results({"dense": 0, "switch": -0.03, "top_k": 0.03}))
    copies = [replace(r, id=f"copy-{r.seed}", arm="copy") for r in results if r.arm == "dense"]
    with_copy = compare([*results, *copies], expected=list_cells([*results, *copies]), baseline="dense")
    without = compare(results, expected=list_cells(results), baseline="dense")
    assert with_copy.find_difference("copy").smallest_detectable is None
    for arm in ("switch", "top_k"):  # one comparison more, the same spread
        values = [comparison.find_difference(arm).smallest_detectable for comparison in (without, with_copy)]
        assert values[0] < values[1] < 1.3 * values[0]


def test_the_best_arm_is_found_over_the_common_seeds():
    # Seeds 3 and 4 are hard, and `late` has not come to them: its own mean is the lowest, its differences are not.
    hard = {0: 0, 1: 0, 2: 0, 3: 1, 4: 1}
    results = [replace(r, metrics={"bits_per_byte": r.metrics["bits_per_byte"] + hard[r.seed]}) for r in (
        *make_results({"dense": 0, "switch": -0.05}),
        *(make_result("late", seed, DENSE[seed] - 0.01 + d) for seed, d in enumerate((0.0005, 0.0, -0.0005))),
    )]  # fmt: skip
    expected = [*list_cells(results), ("late", 3, "late-3"), ("late", 4, "late-4")]
    comparison = compare(results, expected=expected, baseline="dense")
    assert summary_of(comparison, "late").mean < summary_of(comparison, "switch").mean
    assert summary_of(comparison, "switch").marks == ("best",)
    assert summary_of(comparison, "late").marks == ()


def test_without_three_seeds_in_common_none_is_best():
    results = make_results({"dense": 0, "a": -0.05, "b": 0.05})
    kept = [r for r in results if r.seed in {"dense": (0, 1, 2, 3, 4), "a": (0, 1, 2), "b": (2, 3, 4)}[r.arm]]
    comparison = compare(kept, expected=list_cells(results), baseline="dense")
    assert [difference.verdict for difference in comparison.differences] == ["better", "worse"]
    assert all(arm.marks == () for arm in comparison.arms)
    assert "no arm is called best: 1 seed finished by all arms, 3 needed" in comparison.notes


def test_runs_of_different_versions_are_noted() -> None:
    results = make_results({"dense": 0.0, "switch": -0.1})
    versions = {"dense": "1.0 (a)", "switch": "1.1 (b)"}
    for known, is_noted in ((versions, True), ({"dense": "1.0 (a)", "switch": ""}, False)):
        runs = [replace(result, version=known[result.arm]) for result in results]
        notes = compare(runs, expected=list_cells(runs), baseline="dense").notes
        assert any("different versions of moebench: 1.0 (a), 1.1 (b)" in note for note in notes) is is_noted


def test_an_arm_whose_seeds_agree_by_luck_gets_no_verdict():
    # Differences of a: -.01 ± .0015 (t = -14); those of b and c scatter by .37, so that -.01 is far within the noise.
    noisy = {"b": (-0.5, 0.4, -0.3, 0.2, -0.1), "c": (0.3, -0.4, 0.5, -0.2, 0.1)}
    results = make_results({"dense": 0, "a": -0.01})
    results += [
        make_result(arm, seed, DENSE[seed] + d) for arm, deltas in noisy.items() for seed, d in enumerate(deltas)
    ]
    comparison = compare(results, expected=list_cells(results), baseline="dense")
    a = comparison.find_difference("a")
    assert (a.p < 0.001, a.p_pooled > 0.9, a.verdict) == (True, True, "undecided")
    assert any(note.startswith("a: p Holm would be 0.00044 by its own pairs alone") for note in comparison.notes)


def test_the_noise_of_an_arm_with_diverged_seeds_is_not_that_of_the_others():
    results = make_results({"dense": 0, "a": -0.01})
    results += [make_result("b", seed, DENSE[seed] + d) for seed, d in enumerate((-0.5, 0.4, -0.3, 0.2, -0.1))]
    ended = fail_seeds(results, "b", (4,), "diverged")
    comparison = compare(ended, expected=list_cells(results), baseline="dense")
    assert [difference.verdict for difference in comparison.differences] == ["better", "diverged"]


def test_equivalence_by_hand():
    # c: mean .0005, SD .00158, n = 5; margin .005 * 2 = .01: t = (.0005 - .01) / (.00158114 / sqrt 5) = -13.435
    # with 4 df -> p = .0000890. At three seeds there is no such test.
    metric = replace(BITS_PER_BYTE, margin=0.005)
    results = make_results({"dense": 0, "c": 0.0005})
    comparison = compare(results, expected=list_cells(results), baseline="dense", metric=metric)
    (difference,) = comparison.differences
    assert difference.p_equivalence == pytest.approx(0.0000890, abs=1e-6)
    assert (difference.verdict, comparison.margin_value) == ("equivalent", pytest.approx(0.01))
    # Bonferroni over one comparison changes nothing.
    assert difference.simultaneous_interval == pytest.approx(difference.interval)
    few = make_results({"dense": 0, "c": 0.0005}, 4)
    (difference,) = compare(few, expected=list_cells(few), baseline="dense", metric=metric).differences
    assert (difference.p_equivalence, difference.verdict) == (None, "undecided")


def test_an_identical_arm_is_equivalent():
    results = make_results({"dense": 0})
    results += [replace(r, id=f"copy-{r.seed}", arm="copy") for r in results]
    comparison = compare(results, expected=list_cells(results), baseline="dense")
    assert comparison.find_difference("copy").verdict == "equivalent"


def test_simultaneous_intervals_by_hand():
    results = with_own_jitter(make_results({"dense": 0, "a": -0.01, "b": 0.01}))
    comparison = compare(results, expected=list_cells(results), baseline="dense")
    for difference in comparison.differences:
        # t(.975, 4) = 2.776445; for two together t(.9875, 4) = 3.495406
        half, together = (high - low for low, high in (difference.interval, difference.simultaneous_interval))
        assert together / half == pytest.approx(3.495406 / 2.776445, rel=1e-5)
