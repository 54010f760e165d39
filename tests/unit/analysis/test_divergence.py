"""Failed and diverged cells: their reasons, verdicts, and the arms that may still be best."""

from dataclasses import replace

import pytest
from support.comparison_runs import fail_seeds, list_cells, make_results, summary_of, with_own_jitter

from moebench.analysis.compare.comparison import compare
from moebench.runs.result import Fault


def test_failed_stopped_and_diverged_cells_keep_their_reasons():
    results = make_results({"dense": 0, "switch": -0.01})
    expected = list_cells(results)
    results[1] = replace(results[1], status="failed", error="out of memory", metrics={})
    results[3] = replace(results[3], status="stopped", step=7, metrics={})
    results[5] = replace(results[5], metrics={"bits_per_byte": float("nan")})
    results[7] = replace(results[7], metrics={"loss": 1.0})
    comparison = compare(results, expected=expected, baseline="dense")
    assert [(cell.arm, cell.seed, cell.reason, cell.diverged) for cell in comparison.failed] == [
        ("switch", 0, "out of memory", False),
        ("switch", 1, "stopped at step 7", False),
        ("switch", 2, "bits_per_byte is nan after 100 steps", True),
        ("switch", 3, "reports no bits_per_byte", False),
    ]
    switch = summary_of(comparison, "switch")
    assert (switch.num_done, switch.num_failed, switch.num_diverged, switch.num_planned) == (1, 4, 1, 5)
    assert "switch: difference over common seeds only, without seed 0, 1, 2, 3" in comparison.notes


def test_survivors_of_a_divergence_win_nothing():
    results = with_own_jitter(make_results({"dense": 0, "switch": -0.03, "top_k": 0.03, "hash": -0.01}))
    expected = list_cells(results)
    assert summary_of(compare(results, expected=expected, baseline="dense"), "switch").marks == ("best",)
    for arm, verdicts in (("switch", ["diverged", "worse", "better"]), ("top_k", ["better", "diverged", "better"])):
        comparison = compare(fail_seeds(results, arm, (1, 3), Fault.DIVERGED), expected=expected, baseline="dense")
        assert [difference.verdict for difference in comparison.differences] == verdicts
        assert comparison.describe_verdict(arm) == "2 of 5 diverged"
        survivors = comparison.find_difference(arm)
        assert survivors.seeds == (0, 2, 4)
        assert survivors.p_holm < 0.05  # shown, and no claim
    assert "best" not in summary_of(comparison, "top_k").marks
    comparison = compare(fail_seeds(results, "switch", (1, 3), Fault.DIVERGED), expected=expected, baseline="dense")
    assert all("best" not in arm.marks for arm in comparison.arms)
    text = "switch has the best mean over the 3 seeds that all arms have finished and is not called best"
    assert f"{text}: 2 of 5 seeds diverged" in comparison.notes
    assert comparison.to_dict()["arms"]["switch"]["runs"] == {"done": 3, "failed": 2, "diverged": 2, "missing": 0}
    assert [(cell["seed"], cell["diverged"]) for cell in comparison.to_dict()["failed"]] == [(1, True), (3, True)]


def test_nothing_wins_against_the_survivors_of_the_baseline():
    results = fail_seeds(
        with_own_jitter(make_results({"dense": 0, "switch": -0.03, "top_k": 0.03})), "dense", (2,), Fault.DIVERGED
    )
    comparison = compare(results, expected=list_cells(results), baseline="dense")
    assert [difference.verdict for difference in comparison.differences] == ["diverged", "diverged"]
    assert comparison.describe_verdict("switch") == "baseline: 1 of 5 diverged"
    assert comparison.describe_verdict("dense") == "baseline, 1 of 5 diverged"
    # Better than all others, of which the baseline's survivors are one, and in every seed that was planned.
    assert summary_of(comparison, "switch").marks == ("best",)


def test_an_arm_that_diverged_throughout_says_so():
    results = fail_seeds(
        make_results({"dense": 0, "switch": -0.01, "top_k": -0.02}), "top_k", (0, 1, 2, 3, 4), Fault.DIVERGED
    )
    comparison = compare(results, expected=list_cells(results), baseline="dense")
    assert comparison.describe_verdict("top_k") == "5 of 5 diverged"
    assert comparison.find_difference("top_k").mean is None
    assert summary_of(comparison, "switch").marks == ("best",)


@pytest.mark.parametrize("fault", [Fault.DIVERGED, "outside"])
def test_without_a_baseline_none_is_best(fault):
    # Whether the arms are matched is unknown.
    results = with_own_jitter(make_results({"dense": 0, "switch": -0.03, "top_k": 0.03}))
    lost = fail_seeds(results, "dense", (0, 1, 2, 3, 4), fault)
    comparison = compare(lost, expected=list_cells(results), baseline="dense")
    assert all(arm.marks == () for arm in comparison.arms)
    text = "baseline: 5 of 5 diverged" if fault == Fault.DIVERGED else "too few seeds"
    assert [comparison.describe_verdict(arm) for arm in ("switch", "top_k")] == [text] * 2


def test_failures_of_the_machine_are_no_outcome_of_the_arm():
    results = make_results({"dense": 0, "switch": -0.01})
    for fault in ("outside", "waited", "own", ""):
        comparison = compare(
            fail_seeds(results, "switch", (1, 3), fault), expected=list_cells(results), baseline="dense"
        )
        assert comparison.find_difference("switch").verdict == comparison.describe_verdict("switch") == "better"
        assert summary_of(comparison, "switch").marks == ("best",)
        assert comparison.to_dict()["arms"]["switch"]["runs"] == {"done": 3, "failed": 2, "diverged": 0, "missing": 0}
        assert len(comparison.failed) == 2


def test_arms_that_are_not_matched_stay_so_when_they_diverge():
    results = fail_seeds(make_results({"dense": 0, "switch": -0.01}), "switch", (1,), Fault.DIVERGED)
    results = [replace(r, data_digest="other") if r.arm == "switch" else r for r in results]
    comparison = compare(results, expected=list_cells(results), baseline="dense", allow_mismatch=True)
    assert comparison.describe_verdict("switch") == "not matched, 1 of 5 diverged"
