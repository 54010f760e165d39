"""From results to verdicts: pairing, refusals, marks, and nothing left out."""

import json
from dataclasses import replace

import pytest

from moebench.analysis.compare.comparison import compare
from moebench.analysis.compare.values import BITS_PER_BYTE
from moebench.errors import UsageError
from moebench.runs.result import Fault, RunResult

HIGHER = replace(BITS_PER_BYTE, lower_is_better=False)
VALIDATION = replace(BITS_PER_BYTE, split="validation")
# Dense over five seeds, and what the arms add to it seed by seed.
DENSE = (2.00, 2.02, 1.98, 2.01, 1.99)
JITTER = (0.001, -0.001, 0.002, -0.002, 0.0)  # mean 0, SD 0.0015811


def cost(flops: float = 2e6, evaluated: float | None = None, **changes: float) -> dict[str, float]:
    executed = {"train_flops_per_token": flops, "eval_flops_per_token": flops if evaluated is None else evaluated}
    planned = {"active_params": 1e6, "total_params": 4e6, "flops_per_token": 2e6, "train_tokens": 8e5}
    return planned | executed | changes


COST = cost()


def run(arm: str, seed: int, value: float, **changes: object) -> RunResult:
    result = RunResult(
        id=f"{arm}-{seed}",
        arm=arm,
        seed=seed,
        status="done",
        error=None,
        step=100,
        metrics={"bits_per_byte": value, "bits_per_byte/code": value - 0.5, "bits_per_byte/law": value + 0.5},
        cost=dict(COST),
        throughput={"tokens_per_s": 1000.0 + seed, "step_s": 0.1, "train_s": 10.0, "total_s": 12.0},
        data_digest="data",
        eval_digest="eval",
        marks=(),
        config={},
    )
    return replace(result, **changes)  # type: ignore[arg-type]


def grid(offsets: dict[str, float], num_seeds: int = 5) -> list[RunResult]:
    """Seeds outermost, as the runner does; the arm with offset 0 gets no jitter: the baseline."""
    return [
        run(arm, seed, DENSE[seed] + offset + (JITTER[seed] if offset else 0))
        for seed in range(num_seeds)
        for arm, offset in offsets.items()
    ]


def cells(results: list[RunResult]) -> list[tuple[str, int, str]]:
    return [(result.arm, result.seed, result.id) for result in results]


def of(comparison, arm):
    return next(summary for summary in comparison.arms if summary.arm == arm)


def test_difference_by_hand():
    results = grid({"dense": 0, "switch": -0.01})
    found = compare(results, expected=cells(results), baseline="dense")
    # dense: mean 2.0, SD 0.0158114, t(.975, 4) = 2.776445 -> half 2.776445 * 0.0158114 / sqrt 5 = 0.019632
    dense = of(found, "dense")
    assert dense.mean == pytest.approx(2.0)
    assert dense.interval == pytest.approx((2 - 0.019632, 2 + 0.019632), abs=1e-6)
    # difference: -0.01 + jitter: mean -0.01, SD 0.00158114 -> half 0.0019632; t = -14.142 -> p = .000145
    (difference,) = found.differences
    assert difference.mean == pytest.approx(-0.01)
    assert difference.interval == pytest.approx((-0.0119632, -0.0080368), abs=1e-6)
    assert difference.p == pytest.approx(0.000145, abs=1e-6)
    assert difference.p_holm == difference.p  # a family of one
    assert difference.verdict == "better"
    assert difference.low_power
    # detectable: 2.0901 SDs for n = 5 (test_statistics simulates it), times the SD of the differences
    assert difference.smallest_detectable == pytest.approx(2.0901 * 0.00158114, rel=1e-3)
    assert of(found, "switch").marks == ("best",)
    assert of(found, "dense").domains == pytest.approx({"code": 1.5, "law": 2.5})


def test_higher_is_better_turns_the_verdict():
    results = grid({"dense": 0, "switch": -0.01})
    found = compare(results, expected=cells(results), baseline="dense", metric=HIGHER)
    assert found.differences[0].verdict == "worse"
    assert {arm.arm: arm.marks for arm in found.arms} == {"dense": ("best",), "switch": ()}


def test_holm_corrects_over_the_arms():
    results = grid({"dense": 0, "a": -0.01, "b": 0.01, "c": 0.0005})
    found = compare(results, expected=cells(results), baseline="dense")
    by_arm = {difference.arm: difference for difference in found.differences}
    # two p of .000145 share the front: 3 * p for both; c: mean .0005, t = 0.7071, 4 df -> p = .5185, times 1
    assert by_arm["a"].p_holm == pytest.approx(3 * 0.000145, abs=3e-6)
    assert by_arm["c"].p_holm == pytest.approx(0.5185, abs=1e-4)
    assert [by_arm[arm].verdict for arm in "abc"] == ["better", "worse", "no difference shown"]
    assert found.num_comparisons == 3


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_fewer_than_three_seeds_decide_nothing(num_seeds):
    results = grid({"dense": 0, "switch": -1.0}, num_seeds)
    found = compare(results, expected=cells(results), baseline="dense")
    (difference,) = found.differences
    assert difference.verdict == "too few seeds"
    assert (difference.p, difference.interval, difference.smallest_detectable) == (None, None, None)
    assert difference.mean == pytest.approx(-1, abs=0.002)
    assert all(arm.marks == () and arm.interval is None for arm in found.arms)


def test_best_is_better_than_every_other_arm():
    # b - a: -0.05 + (.001, -.001, .002, 0, -.002): t = -70.7, far below .05 even with the other pair corrected
    b = [run("b", seed, DENSE[seed] - 0.06 + d) for seed, d in enumerate((0.001, -0.001, 0.002, 0, -0.002))]
    results = grid({"dense": 0, "a": -0.01}) + b
    found = compare(results, expected=cells(results), baseline="dense")
    assert [difference.verdict for difference in found.differences] == ["better", "better"]
    assert {arm.arm: arm.marks for arm in found.arms} == {"dense": (), "a": (), "b": ("best",)}


def test_two_good_arms_that_are_near_have_no_best():
    b = [run("b", seed, DENSE[seed] - 0.0105 + d) for seed, d in enumerate((0.002, -0.002, 0.003, 0, -0.003))]
    results = grid({"dense": 0, "a": -0.01}) + b
    found = compare(results, expected=cells(results), baseline="dense")
    assert [difference.verdict for difference in found.differences] == ["better", "better"]
    assert all(arm.marks == () for arm in found.arms)
    assert "b has the best mean, but is not shown to be better than a" in found.notes


def test_a_better_arm_is_not_best_while_another_has_a_better_mean():
    results = grid({"dense": 0, "a": -0.01}) + [
        run("b", seed, DENSE[seed] + d) for seed, d in enumerate((-0.5, 0.4, -0.3, 0.2, -0.1))
    ]
    found = compare(results, expected=cells(results), baseline="dense")
    assert [difference.verdict for difference in found.differences] == ["better", "no difference shown"]
    assert all(arm.marks == () for arm in found.arms)
    assert "b has the best mean, but is not shown to be better than dense, a" in found.notes


def test_a_non_causal_arm_is_marked_and_not_best():
    results = grid({"dense": 0, "expert_choice": -0.01})
    results = [replace(r, marks=("non-causal",)) if r.arm == "expert_choice" else r for r in results]
    found = compare(results, expected=cells(results), baseline="dense")
    assert of(found, "expert_choice").marks == ("non-causal",)
    assert found.differences[0].verdict == "better"


def test_failed_stopped_and_diverged_cells_keep_their_reasons():
    results = grid({"dense": 0, "switch": -0.01})
    expected = cells(results)
    results[1] = replace(results[1], status="failed", error="out of memory", metrics={})
    results[3] = replace(results[3], status="stopped", step=7, metrics={})
    results[5] = replace(results[5], metrics={"bits_per_byte": float("nan")})
    results[7] = replace(results[7], metrics={"loss": 1.0})
    found = compare(results, expected=expected, baseline="dense")
    assert [(cell.arm, cell.seed, cell.reason, cell.diverged) for cell in found.failed] == [
        ("switch", 0, "out of memory", False),
        ("switch", 1, "stopped at step 7", False),
        ("switch", 2, "bits_per_byte is nan after 100 steps", True),
        ("switch", 3, "reports no bits_per_byte", False),
    ]
    switch = of(found, "switch")
    assert (switch.num_done, switch.num_failed, switch.num_diverged, switch.num_planned) == (1, 4, 1, 5)
    assert "switch: difference over common seeds only, without seed 0, 1, 2, 3" in found.notes


def test_a_half_finished_grid_is_compared_over_common_seeds():
    results = grid({"dense": 0, "switch": -0.01, "top_p": 0.01})
    found = compare(results[:-2], expected=cells(results), baseline="dense")
    assert [(cell.arm, cell.seed) for cell in found.missing] == [("switch", 4), ("top_p", 4)]
    assert [difference.seeds for difference in found.differences] == [(0, 1, 2, 3)] * 2
    assert of(found, "dense").seeds == (0, 1, 2, 3, 4)
    assert found.notes[0] == "2 of 15 cells have no result yet: this is an early look"


def test_before_the_first_result_everything_is_missing():
    results = grid({"dense": 0, "switch": -0.01})
    found = compare([], expected=cells(results), baseline="dense")
    assert len(found.missing) == 10
    assert [arm.mean for arm in found.arms] == [None, None]
    assert found.differences[0].verdict == "too few seeds"
    json.dumps(found.to_dict(), allow_nan=False)


def test_results_of_another_grid_are_named_not_used():
    results = grid({"dense": 0, "switch": -0.01})
    stranger = run("switch", 9, 0.1, id="stranger")
    found = compare([*results, stranger], expected=cells(results), baseline="dense")
    assert of(found, "switch").seeds == (0, 1, 2, 3, 4)
    assert any("stranger" in note for note in found.notes)


def test_unknown_baseline_metric_and_double_cells_are_refused():
    results = grid({"dense": 0, "switch": -0.01})
    with pytest.raises(UsageError, match=r"baseline: 'swich' .*Did you mean 'switch'.*dense, switch"):
        compare(results, expected=cells(results), baseline="swich")
    with pytest.raises(UsageError, match=r"metric: 'bits' .*bits_per_byte"):
        compare(results, expected=cells(results), baseline="dense", metric=replace(BITS_PER_BYTE, name="bits"))
    with pytest.raises(UsageError, match="same seed twice"):
        compare(results, expected=[*cells(results), ("dense", 0, "other")], baseline="dense")


def test_two_arms_of_one_cell_are_refused():
    # Under a second label switch would make Holm's family larger, and tie with itself for the best.
    results = grid({"dense": 0, "switch": -0.01})
    copies = [("again", seed, f"switch-{seed}") for seed in range(5)]
    message = r"arms 'switch' \(seed 0\) and 'again' \(seed 0\) are one and the same cell, switch-0"
    with pytest.raises(UsageError, match=message):
        compare(results, expected=[*cells(results), *copies], baseline="dense")
    with pytest.raises(UsageError, match="dense-0: 2 results of one cell are given"):
        compare([*results, replace(results[0], seed=7)], expected=cells(results), baseline="dense")


@pytest.mark.parametrize(
    ("changes", "words", "mark"),
    [
        ({"cost": COST | {"train_tokens": 9e5}}, "train_tokens is 900,000, the baseline's 800,000", "≠tokens"),
        ({"data_digest": "other"}, "data_digest is other, the baseline's data", "≠data"),
        ({"eval_digest": "other"}, "eval_digest is other, the baseline's eval", "≠eval"),
    ],
)
def test_arms_of_other_data_are_refused_or_marked(changes, words, mark):
    results = grid({"dense": 0, "switch": -0.01, "top_p": -0.005})
    results = [replace(r, **changes) if r.arm == "switch" else r for r in results]
    with pytest.raises(UsageError, match=f"arm 'switch': .*{words}.*--allow-mismatch"):
        compare(results, expected=cells(results), baseline="dense")
    found = compare(results, expected=cells(results), baseline="dense", allow_mismatch=True)
    assert of(found, "switch").marks == (mark,)
    assert [difference.verdict for difference in found.differences] == ["not matched", "better"]
    assert found.differences[0].mean == pytest.approx(-0.01)  # numbers stay, the claim goes
    assert of(found, "top_p").marks == ("best",)  # an arm outside the match does not compete
    assert found.notes[0].startswith("switch: ")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (cost(2.05e6), "1.025 times the baseline's in training, 1.025 times the baseline's in evaluation"),
        (cost(1.95e6), "0.975 times the baseline's in training, 0.975 times the baseline's in evaluation"),
        (cost(2e6, 12.4e6), "1 times the baseline's in training, 6.2 times the baseline's in evaluation"),
        (cost(4e6, 2e6), "2 times the baseline's in training, 1 times the baseline's in evaluation"),
        ({"train_tokens": 8e5}, "train_flops_per_token is not known for every run"),
    ],
)
def test_arms_of_another_executed_cost_get_no_verdict_unless_allowed(changed, words):
    results = grid({"dense": 0, "switch": -0.01, "top_p": -0.005})
    results = [replace(r, cost=changed) if r.arm == "switch" else r for r in results]
    found = compare(results, expected=cells(results), baseline="dense")
    assert of(found, "switch").marks == ("≠FLOPs",)
    assert [difference.verdict for difference in found.differences] == ["not matched", "better"]
    assert found.differences[0].mean == pytest.approx(-0.01)  # numbers stay, the claim goes
    assert of(found, "top_p").marks == ("best",)  # an arm outside the match does not compete
    assert words in found.notes[0]
    allowed = compare(results, expected=cells(results), baseline="dense", allow_mismatch=True)
    assert allowed.differences[0].verdict == "better"
    assert of(allowed, "switch").marks == ("≠FLOPs",)


def test_executed_cost_is_compared_over_common_seeds():
    # Dense costs more on seeds that switch has not finished; where both have, they cost the same.
    results = grid({"dense": 0, "switch": -0.01})
    results = [replace(r, cost=cost(2.2e6 if r.arm == "dense" and r.seed > 2 else 2e6)) for r in results]
    results = [r for r in results if r.arm == "dense" or r.seed <= 2]
    found = compare(results, expected=cells(results), baseline="dense")
    assert of(found, "switch").flops_vs_baseline == {"training": 1.0, "evaluation": 1.0}
    assert "≠FLOPs" not in of(found, "switch").marks


def test_the_planned_cost_decides_nothing():
    results = grid({"dense": 0, "switch": -0.01})
    results = [replace(r, cost=COST | {"flops_per_token": 9e6}) if r.arm == "switch" else r for r in results]
    assert compare(results, expected=cells(results), baseline="dense").differences[0].verdict == "better"


def test_executed_cost_is_compared_by_its_mean_over_seeds():
    # Seeds drop more or less: 2.08e6 and 1.96e6 by turns have the mean 2.032e6 over five seeds, 1.6 % above.
    results = grid({"dense": 0, "switch": -0.01})
    results = [replace(r, cost=cost(1.96e6 if r.seed % 2 else 2.08e6)) if r.arm == "switch" else r for r in results]
    found = compare(results, expected=cells(results), baseline="dense")
    assert found.differences[0].verdict == "better"
    assert of(found, "switch").flops_vs_baseline == pytest.approx({"training": 1.016, "evaluation": 1.016})


def test_tokens_that_differ_between_seeds_alike_for_all_arms_are_matched() -> None:
    # Recordings differ in length, and every seed draws others.
    results = grid({"dense": 0, "switch": -0.01})
    results = [replace(r, cost=COST | {"train_tokens": 8e5 + r.seed}) for r in results]
    found = compare(results, expected=cells(results), baseline="dense")
    assert "≠tokens" not in of(found, "switch").marks
    results[-1] = replace(results[-1], cost=COST | {"train_tokens": 8e5})
    with pytest.raises(UsageError, match=r"train_tokens is 800,00\d, the baseline's 800,00\d"):
        compare(results, expected=cells(results), baseline="dense")


def config(router: str, match: str, **layout: object) -> dict[str, object]:
    return {"router": {"name": router}, "layout": {"match": match, "expert_width": None, **layout}}


def solved(changes: dict[str, dict[str, object]]) -> list[RunResult]:
    """Runs of a dense arm and others, each arm with its own cost and configuration."""
    results = grid({"dense": 0} | dict.fromkeys(changes, -0.01))
    results = [replace(r, config=config("dense", "params")) if r.arm == "dense" else r for r in results]
    return [replace(r, **changes[r.arm]) if r.arm in changes else r for r in results]


def test_arms_matched_by_parameters_are_compared_by_parameters():
    fewer_flops = cost(1e6)
    results = solved({"switch": {"cost": fewer_flops, "config": config("switch", "params")}})
    assert compare(results, expected=cells(results), baseline="dense").differences[0].verdict == "better"
    larger = fewer_flops | {"total_params": 4.2e6}
    results = solved({"switch": {"cost": larger, "config": config("switch", "params")}})
    found = compare(results, expected=cells(results), baseline="dense")
    assert of(found, "switch").marks == ("≠params",)
    assert found.differences[0].verdict == "not matched"
    assert found.notes[0] == "switch: parameters are 1.05 times the baseline's (matched: ±2 %)"


def test_passes_of_training_are_compared_beside_parameters():
    twice = {"cost": COST | {"train_passes": 2.0}, "config": config("thor", "params")}
    results = solved({"thor": twice})
    found = compare(results, expected=cells(results), baseline="dense")
    assert of(found, "thor").marks == ("≠passes",)
    assert found.differences[0].verdict == "not matched"


def test_a_width_that_was_given_is_not_matched_by_parameters():
    results = solved({"switch": {"cost": cost(1e6), "config": config("switch", "params", expert_width=8)}})
    assert of(compare(results, expected=cells(results), baseline="dense"), "switch").marks == ("≠FLOPs",)


def test_one_comparison_has_one_quantity():
    # Both cost what the dense arm costs in their own quantity, and nothing alike in the other's.
    results = solved(
        {
            "switch": {"cost": cost(1e6), "config": config("switch", "params")},
            "top_k": {"cost": COST | {"total_params": 3e7}, "config": config("top_k", "flops")},
        }
    )
    words = r"arm 'top_k': its width was solved for FLOPs per token, the comparison is by total parameters"
    with pytest.raises(UsageError, match=words):
        compare(results, expected=cells(results), baseline="dense")
    found = compare(results, expected=cells(results), baseline="dense", allow_mismatch=True)
    assert of(found, "switch").marks == ("best",)
    assert of(found, "top_k").marks == ("≠match",)


def test_two_percent_of_flops_are_allowed():
    results = grid({"dense": 0, "switch": -0.01})
    results = [replace(r, cost=cost(2.04e6)) if r.arm == "switch" else r for r in results]
    assert compare(results, expected=cells(results), baseline="dense").differences[0].verdict == "better"


def test_load_speed_and_cost_are_averaged_over_seeds():
    results = grid({"dense": 0, "switch": -0.01})
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
    switch = of(compare(results, expected=cells(results), baseline="dense"), "switch")
    assert switch.load == pytest.approx({"cv": 0.3})
    # medians: switch of {1, 501, 502, 503, 504} = 502; dense of {1000 ... 1004} = 1002
    assert switch.throughput_share == pytest.approx(502 / 1002)
    assert switch.cost == COST


def test_equal_differences_for_every_seed_are_called_out():
    results = grid({"dense": 0}) + [run("copy", seed, value - 0.25) for seed, value in enumerate(DENSE)]
    found = compare(results, expected=cells(results), baseline="dense")
    assert found.differences[0].verdict == "no difference shown"
    assert any("the same difference for every seed" in note for note in found.notes)


def test_to_dict_is_json_with_the_promised_keys():
    results = grid({"dense": 0, "switch": -0.01})
    found = json.loads(json.dumps(compare(results, expected=cells(results), baseline="dense").to_dict()))
    assert found["arms"]["dense"]["difference"] is None
    switch = found["arms"]["switch"]
    assert set(switch) == {
        "bits_per_byte", "cost", "difference", "domains", "flops_vs_baseline",
        "out_of_domain", "load", "marks", "parallel", "runs", "throughput"
    }  # fmt: skip
    assert set(switch["bits_per_byte"]["seeds"]) == {"0", "1", "2", "3", "4"}
    assert switch["difference"]["verdict"] == "better"
    assert set(switch["difference"]) == {
        "baseline", "effect_sd", "interval", "low_power", "mean", "p", "p_exact", "p_holm", "seeds",
        "smallest_detectable", "verdict",
    }  # fmt: skip
    assert switch["runs"] == {"done": 5, "failed": 0, "diverged": 0, "missing": 0}


def end(results: list[RunResult], arm: str, seeds: tuple[int, ...], fault: str) -> list[RunResult]:
    """Let these seeds of an arm fail in the way named."""
    lost = {"status": "failed", "error": f"it {fault}", "fault": fault, "metrics": {}}
    return [replace(r, **lost) if r.arm == arm and r.seed in seeds else r for r in results]


def shaken_apart(results: list[RunResult]) -> list[RunResult]:
    """Give each arm a jitter of its own: any pair of them has differences that vary."""
    arms = list(dict.fromkeys(result.arm for result in results))
    moves = {(r.arm, r.seed): 0.0005 * ((r.seed + 1) * (arms.index(r.arm) + 1) % 5 - 2) for r in results}
    return [replace(r, metrics={"bits_per_byte": r.metrics["bits_per_byte"] + moves[r.arm, r.seed]}) for r in results]


def test_survivors_of_a_divergence_win_nothing():
    results = shaken_apart(grid({"dense": 0, "switch": -0.03, "top_k": 0.03, "hash": -0.01}))
    expected = cells(results)
    assert of(compare(results, expected=expected, baseline="dense"), "switch").marks == ("best",)
    for arm, verdicts in (("switch", ["diverged", "worse", "better"]), ("top_k", ["better", "diverged", "better"])):
        found = compare(end(results, arm, (1, 3), Fault.DIVERGED), expected=expected, baseline="dense")
        assert [difference.verdict for difference in found.differences] == verdicts
        assert found.describe_verdict(arm) == "2 of 5 diverged"
        survivors = found.find_difference(arm)
        assert survivors.seeds == (0, 2, 4)
        assert survivors.p_holm < 0.05  # shown, and no claim
    assert "best" not in of(found, "top_k").marks
    found = compare(end(results, "switch", (1, 3), Fault.DIVERGED), expected=expected, baseline="dense")
    assert all("best" not in arm.marks for arm in found.arms)
    words = "switch has the best mean over the 3 seeds that all arms have finished and is not called best"
    assert f"{words}: 2 of 5 seeds diverged" in found.notes
    assert found.to_dict()["arms"]["switch"]["runs"] == {"done": 3, "failed": 2, "diverged": 2, "missing": 0}
    assert [(cell["seed"], cell["diverged"]) for cell in found.to_dict()["failed"]] == [(1, True), (3, True)]


def test_nothing_wins_against_the_survivors_of_the_baseline():
    results = end(shaken_apart(grid({"dense": 0, "switch": -0.03, "top_k": 0.03})), "dense", (2,), Fault.DIVERGED)
    found = compare(results, expected=cells(results), baseline="dense")
    assert [difference.verdict for difference in found.differences] == ["diverged", "diverged"]
    assert found.describe_verdict("switch") == "baseline: 1 of 5 diverged"
    assert found.describe_verdict("dense") == "baseline, 1 of 5 diverged"
    # Better than all others, of which the baseline's survivors are one, and in every seed that was planned.
    assert of(found, "switch").marks == ("best",)


def test_an_arm_that_diverged_throughout_says_so():
    results = end(grid({"dense": 0, "switch": -0.01, "top_k": -0.02}), "top_k", (0, 1, 2, 3, 4), Fault.DIVERGED)
    found = compare(results, expected=cells(results), baseline="dense")
    assert found.describe_verdict("top_k") == "5 of 5 diverged"
    assert found.find_difference("top_k").mean is None
    assert of(found, "switch").marks == ("best",)


@pytest.mark.parametrize("fault", [Fault.DIVERGED, "outside"])
def test_without_a_baseline_none_is_best(fault):
    # Nothing says whether the arms are matched.
    results = shaken_apart(grid({"dense": 0, "switch": -0.03, "top_k": 0.03}))
    lost = end(results, "dense", (0, 1, 2, 3, 4), fault)
    found = compare(lost, expected=cells(results), baseline="dense")
    assert all(arm.marks == () for arm in found.arms)
    words = "baseline: 5 of 5 diverged" if fault == Fault.DIVERGED else "too few seeds"
    assert [found.describe_verdict(arm) for arm in ("switch", "top_k")] == [words] * 2


def test_a_copy_of_the_baseline_does_not_make_differences_easy_to_detect():
    results = shaken_apart(grid({"dense": 0, "switch": -0.03, "top_k": 0.03}))
    copies = [replace(r, id=f"copy-{r.seed}", arm="copy") for r in results if r.arm == "dense"]
    with_copy = compare([*results, *copies], expected=cells([*results, *copies]), baseline="dense")
    without = compare(results, expected=cells(results), baseline="dense")
    assert with_copy.find_difference("copy").smallest_detectable is None
    for arm in ("switch", "top_k"):  # one comparison more, the same spread
        values = [found.find_difference(arm).smallest_detectable for found in (without, with_copy)]
        assert values[0] < values[1] < 1.3 * values[0]


def test_failures_of_the_machine_are_no_outcome_of_the_arm():
    results = grid({"dense": 0, "switch": -0.01})
    for fault in ("outside", "waited", "own", ""):
        found = compare(end(results, "switch", (1, 3), fault), expected=cells(results), baseline="dense")
        assert found.find_difference("switch").verdict == found.describe_verdict("switch") == "better"
        assert of(found, "switch").marks == ("best",)
        assert found.to_dict()["arms"]["switch"]["runs"] == {"done": 3, "failed": 2, "diverged": 0, "missing": 0}
        assert len(found.failed) == 2


def test_arms_that_are_not_matched_stay_so_when_they_diverge():
    results = end(grid({"dense": 0, "switch": -0.01}), "switch", (1,), Fault.DIVERGED)
    results = [replace(r, data_digest="other") if r.arm == "switch" else r for r in results]
    found = compare(results, expected=cells(results), baseline="dense", allow_mismatch=True)
    assert found.describe_verdict("switch") == "not matched, 1 of 5 diverged"


def test_the_leader_is_found_over_the_seeds_that_all_have():
    # Seeds 3 and 4 are hard, and `late` has not come to them: its own mean is the lowest, its differences are not.
    hard = {0: 0, 1: 0, 2: 0, 3: 1, 4: 1}
    results = [replace(r, metrics={"bits_per_byte": r.metrics["bits_per_byte"] + hard[r.seed]}) for r in (
        *grid({"dense": 0, "switch": -0.05}),
        *(run("late", seed, DENSE[seed] - 0.01 + d) for seed, d in enumerate((0.0005, 0.0, -0.0005))),
    )]  # fmt: skip
    expected = [*cells(results), ("late", 3, "late-3"), ("late", 4, "late-4")]
    found = compare(results, expected=expected, baseline="dense")
    assert of(found, "late").mean < of(found, "switch").mean
    assert of(found, "switch").marks == ("best",)
    assert of(found, "late").marks == ()


def test_without_three_seeds_in_common_none_is_best():
    results = grid({"dense": 0, "a": -0.05, "b": 0.05})
    kept = [r for r in results if r.seed in {"dense": (0, 1, 2, 3, 4), "a": (0, 1, 2), "b": (2, 3, 4)}[r.arm]]
    found = compare(kept, expected=cells(results), baseline="dense")
    assert [difference.verdict for difference in found.differences] == ["better", "worse"]
    assert all(arm.marks == () for arm in found.arms)
    assert "no arm is called best: 1 seed finished by all arms, 3 needed" in found.notes


def test_the_split_is_chosen_and_said():
    results = grid({"dense": 0, "switch": -0.01})
    results = [replace(r, validation={"bits_per_byte": 4 - r.metrics["bits_per_byte"]}) for r in results]
    on_test, on_validation = (
        compare(results, expected=cells(results), baseline="dense", metric=metric)
        for metric in (BITS_PER_BYTE, VALIDATION)
    )
    assert on_test.differences[0].mean == pytest.approx(-0.01)
    assert on_validation.differences[0].mean == pytest.approx(0.01)
    assert of(on_validation, "dense").values[1] == pytest.approx(1.98)
    assert of(on_validation, "dense").domains == {}
    assert (on_test.to_dict()["split"], on_validation.to_dict()["split"]) == ("test", "validation")


def test_results_without_validation_metrics_are_named():
    results = grid({"dense": 0, "switch": -0.01})
    with_validation = [replace(r, validation=r.metrics) for r in results]
    old = [*with_validation[:-1], results[-1]]
    message = r"--split validation: 1 of 10 results have no validation metrics, first switch, seed 4 \(switch-4\)"
    with pytest.raises(UsageError, match=message):
        compare(old, expected=cells(results), baseline="dense", metric=VALIDATION)
    failed = end(with_validation, "switch", (4,), Fault.DIVERGED)
    failed[-1] = replace(failed[-1], validation={})  # a failure has no metrics of any split
    found = compare(failed, expected=cells(results), baseline="dense", metric=VALIDATION)
    assert found.describe_verdict("switch") == "1 of 5 diverged"


def configured(**sections: dict[str, object]) -> dict[str, object]:
    plain = {"train": {"learning_rate": 0.002, "steps": 9}, "router": {"name": "switch", "losses": {"balance": 0.01}}}
    return plain | {"parallel": {"data": 1}, "layout": {"name": "every_n", "n": 1}} | sections


ONE_LOSS_LESS = configured(router={"name": "switch", "losses": {}})


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (configured(), None),
        (configured(router={"name": "top_k", "losses": {"balance": 0.1}}), None),  # another algorithm, its own losses
        (configured(layout={"name": "every_n", "n": 2}), None),
        (configured(parallel={"data": 2}), None),
        (configured(train={"learning_rate": 0.006, "steps": 9}), "train.learning_rate"),
        (configured(router={"name": "switch", "losses": {"balance": 0.1}}), "router.losses.balance"),
        (ONE_LOSS_LESS, "router.losses.balance"),
        (ONE_LOSS_LESS | {"balance": {"scope": "local"}}, "balance.scope, router.losses.balance"),
    ],
)
def test_a_grid_of_settings_says_on_which_split_to_choose(other, named):
    results = [
        replace(r, config=configured() if r.arm == "dense" else other, validation=r.metrics)
        for r in grid({"dense": 0, "switch": -0.01})
    ]
    for metric, words in (
        (BITS_PER_BYTE, "who chooses by this table tunes on test; choose with --split validation, and"),
        (VALIDATION, "choose on validation, as here, and"),
    ):
        notes = compare(results, expected=cells(results), baseline="dense", metric=metric).notes
        said = f"this grid varies {named}: {words} report what was chosen on test with fresh seeds"
        assert notes == ((said,) if named else ())
