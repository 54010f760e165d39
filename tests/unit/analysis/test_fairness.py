"""Equal tokens, FLOPs, parameters and time; speed-ups with censored seeds; conditions of times."""

import json
from dataclasses import replace

import numpy as np
import pytest
from support.measured_arms import ALONE, make_arms, make_curve
from support.run_folders import write_cell

from moebench.analysis.fairness.along_axis import build_axis_table, read_along_axis
from moebench.analysis.fairness.conditions import find_time_problem, read_conditions
from moebench.analysis.fairness.measure import compare_on_axes, describe_arm
from moebench.analysis.fairness.report import build_fairness_table, format_speed_up
from moebench.analysis.fairness.speed_up import SpeedUp, compute_speed_up, find_budget
from moebench.runs.attempts import Attempt, record_attempt
from moebench.runs.journal import Point

DENSE = [make_curve([5, 4, 3, 2.5, 2 + d]) for d in (0.0, 0.02, -0.02)]
QUICK = [make_curve([4, 3, 2, 1.9, 1.8 + d], seconds=200) for d in (0.01, 0.02, 0.0)]
"""Better at equal tokens; at the time of dense, step 50 of 100, it is between 3 and 2."""


def compare(curves, **keys):
    fairness = compare_on_axes(make_arms(curves, keys.pop("conditions", None)), **keys)
    return fairness, {arm.arm: arm for arm in fairness.arms}


def test_equal_tokens_and_time_by_hand():
    fairness, arms = compare({"dense": DENSE, "switch": QUICK})
    equal = arms["switch"].equal
    # 1.81, 1.82, 1.8 minus 2, 2.02, 1.98
    assert equal["tokens"].pair.mean == pytest.approx(-0.19)
    assert equal["flops"].pair == equal["tokens"].pair
    # at 100 s the arm is at step 50, between 3 (step 40) and 2 (step 60): ln(5/4) / ln(3/2) = .55034 of the way
    assert equal["seconds"].pair.mean == pytest.approx(0.44966, abs=1e-5)
    assert equal["parameters"].problem == "not run"
    assert describe_arm(fairness, arms["switch"]) == (
        "switch against dense: ahead at equal tokens, FLOPs; not run at equal parameters; behind at equal time"
    )
    assert any("learning rate" in note for note in fairness.notes)
    json.dumps(fairness.to_dict(), allow_nan=False)


def test_speed_up_by_hand():
    _, arms = compare({"dense": DENSE, "switch": QUICK})
    # dense ends at 2, 2.02, 1.98; the arm has them at steps 60, 40 * 1.5^.98 and 60 * (4/3)^.2
    steps = {0: 60, 1: 59.51546, 2: 63.55306}
    by_hand = {seed: 100 / step for seed, step in steps.items()}
    assert arms["switch"].speed_up["steps"].ratios == pytest.approx(by_hand, rel=1e-5)
    by_hand = {seed: 50 / step for seed, step in steps.items()}
    assert arms["switch"].speed_up["seconds"].ratios == pytest.approx(by_hand, rel=1e-5)


def test_an_arm_that_ended_earlier_is_not_extrapolated():
    fast = [make_curve([4, 3, 2, 1.9, 1.8], seconds=50) for _ in range(3)]
    _, arms = compare({"dense": DENSE, "switch": fast})
    assert arms["switch"].equal["seconds"].problem == "not reached, ended at 0.50×"
    mixed = [*fast[:2], make_curve([4, 3, 2, 1.9, 1.8], seconds=100)]
    _, arms = compare({"dense": DENSE, "switch": mixed})
    assert arms["switch"].equal["seconds"].problem == "not reached in 2 of 3, ended at 0.50×"


def test_too_few_evaluations_are_named_with_the_setting():
    curves = {"dense": [make_curve([2.0]) for _ in range(3)], "switch": [make_curve([1.9], 150) for _ in range(3)]}
    fairness, arms = compare(curves)
    assert arms["switch"].equal["seconds"].problem == "too few evaluations"
    assert arms["switch"].equal["tokens"].pair.mean == pytest.approx(-0.1)
    assert arms["switch"].speed_up == {}
    assert any("train.eval_every=5" in note for note in fairness.notes)


def test_runs_too_short_for_enough_evaluations_need_more_steps():
    arms = make_arms({"dense": [make_curve([2.0])] * 3, "switch": [make_curve([1.9])] * 3})
    (note,) = [note for note in compare_on_axes(replace(arms, num_steps=1)).notes if note.startswith("only 1 eval")]
    assert note.endswith("need 5; train with train.steps=5 or more")


def test_the_first_crossing_counts():
    curve = make_curve([5, 4, 3, 3.5, 1])
    assert find_budget(curve, "steps", 3.25, lower_is_better=True) == (pytest.approx(40 * 1.5**0.75), "reached")
    assert find_budget(curve, "steps", 0.5, lower_is_better=True) == (100, "never")
    assert find_budget(curve, "steps", 6, lower_is_better=True) == (20, "before the first evaluation")
    rising = make_curve([0.1, 0.2, 0.4, 0.5, 0.6])
    assert find_budget(rising, "steps", 0.3, lower_is_better=False) == (pytest.approx((40 * 60) ** 0.5), "reached")


def test_equal_curves_have_a_speed_up_of_one():
    curves = dict(enumerate(DENSE))
    speed_up = compute_speed_up(curves, curves, "flops", lower_is_better=True)
    assert (speed_up.estimate, speed_up.bound) == (pytest.approx(1), "")


def test_the_interval_of_a_speed_up_is_that_of_logarithms():
    # logs of 1, 2, 4: mean ln 2, SD ln 2, half 4.302653 * ln 2 / sqrt 3
    speed_up = SpeedUp(ratios={0: 1.0, 1: 2.0, 2: 4.0})
    half = 4.302653 / 3**0.5
    assert speed_up.estimate == pytest.approx(2)
    assert speed_up.interval == pytest.approx((2 ** (1 - half), 2 ** (1 + half)), rel=1e-6)
    assert format_speed_up(speed_up) == "×2.00 [0.36, 11.19]"


@pytest.mark.parametrize("num_evaluations", [6, 10])
def test_a_planted_speed_up_is_covered(num_evaluations):
    """Curves 2 + 0.6 / sqrt(k t) that differ between seeds by SD 0.004 and between evaluations by a third of it."""
    rng, covered = np.random.default_rng(0), []
    share_P = np.arange(1, num_evaluations + 1) / num_evaluations
    for _ in range(200):
        truth = rng.uniform(1.1, 2.5)
        arm, dense = (
            {
                seed: make_curve(
                    2 + 0.6 / np.sqrt(k * share_P) + rng.normal(0, 0.004) + rng.normal(0, 0.0013, len(share_P))
                )
                for seed in range(5)
            }
            for k in (truth, 1.0)
        )
        low, high = compute_speed_up(arm, dense, "steps", lower_is_better=True).interval
        covered.append(low <= truth <= high)
    assert np.mean(covered) >= 0.88


def test_censored_seeds_bound_the_speed_up():
    speed_up = SpeedUp(ratios={0: 2.0, 1: 4.0}, never={2: 1.0})
    assert (speed_up.bound, speed_up.estimate, speed_up.interval) == ("<", pytest.approx(2), None)
    assert format_speed_up(speed_up) == "<×2.00, never in 1 of 3"
    assert format_speed_up(SpeedUp(never={0: 1.0, 1: 1.0})) == "never in 2 of 2"
    early = SpeedUp(ratios={0: 2.0}, early={1: 8.0})
    assert format_speed_up(early) == ">×4.00, before the first evaluation in 1 of 2"
    both = SpeedUp(ratios={0: 2.0}, early={1: 8.0}, never={2: 1.0})
    assert both.estimate is None
    assert format_speed_up(None) == "–"


def test_equal_parameters_are_those_of_a_reference_or_between_two():
    curves = {"dense": DENSE, "switch": QUICK, "dense_large": [make_curve([3, 2, 2, 2, 1.6])] * 3}
    _, arms = compare(curves)
    # switch has 4 M, dense 1 M and 8 M: two thirds of the way in the logarithm from 2 to 1.6
    equal = arms["switch"].equal["parameters"]
    between = [2 + 2 / 3 * (1.6 - 2), 2.02 + 2 / 3 * (1.6 - 2.02), 1.98 + 2 / 3 * (1.6 - 1.98)]
    assert equal.pair.mean == pytest.approx((1.81 + 1.82 + 1.8 - sum(between)) / 3)
    assert equal.note == "parameters between dense and dense_large, linear in their logarithm"
    assert arms["dense_large"].equal["parameters"].problem == "not run"
    arms = make_arms(curves)
    large = {s: replace(r, cost={**r.cost, "total_params": 4.05e6}) for s, r in arms.runs["dense_large"].items()}
    equal = compare_on_axes(replace(arms, runs={**arms.runs, "dense_large": large})).arms[0].equal["parameters"]
    assert (equal.note, equal.pair.mean) == ("parameters of dense_large", pytest.approx(0.21))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"hardware": "gpu"}, "measured on different hardware (cpu; gpu)"),
        ({"hardware": ""}, "the hardware of a run is not recorded"),
        ({"num_starts": 2}, "1 of 6 runs were stopped and resumed"),
        (
            {"cells_at_a_time": 2.0},
            "measured with 1.0 to 2.0 cells at a time (`run --jobs 1` trains one after the other)",
        ),
        ({"cells_at_a_time": None}, "it is not recorded when a run was trained"),
    ],
)
def test_times_measured_differently_are_not_stated(changes, problem):
    conditions = {("switch", 1): replace(ALONE, **changes)}
    fairness, arms = compare({"dense": DENSE, "switch": QUICK, "hash": QUICK}, conditions=conditions)
    assert arms["switch"].equal["seconds"].problem == "not comparable"
    assert "seconds" not in arms["switch"].speed_up
    assert arms["hash"].equal["seconds"].pair is not None
    assert f"switch: time: {problem}" in fairness.notes
    fairness, arms = compare({"dense": DENSE, "switch": QUICK}, conditions=conditions, ignore_conditions=True)
    assert arms["switch"].equal["seconds"].pair is not None
    assert f"switch: time: {problem}" in fairness.notes
    assert find_time_problem([ALONE, replace(ALONE, cells_at_a_time=1.1)]) == ""


def test_arms_with_the_same_outcome_share_a_sentence():
    fairness, _ = compare({"dense": DENSE, "switch": QUICK, "hash": QUICK})
    (note,) = [note for note in build_fairness_table(fairness).notes if "against dense" in note]
    assert note.startswith("switch, hash against dense: ")


def test_conditions_are_read_from_attempts(tmp_path):
    for name, starts in {"a": [0.0], "b": [5.0], "c": [100.0, 120.0], "d": []}.items():
        folder = tmp_path / "runs" / name
        write_cell(folder)
        (folder / "environment.json").write_text(json.dumps({"processor": "x", "device": "cpu", "cores": 2}))
        for start in starts:
            attempt = Attempt(started_at=start, seconds=10.0, status="done", error=None, fault="", step=1)
            record_attempt(folder / "attempts.jsonl", attempt)
    with (tmp_path / "runs" / "a" / "attempts.jsonl").open("a") as file:
        file.write('{"started_at": "x", "seconds": 1e999, "status": "done", "error": null, "fault": "", "step": 1}\n')
    points = [Point(step=s, time=t, metrics={}, end=0) for s, t in ((1, 100.0), (2, 105.0), (3, float("nan")))]
    conditions = read_conditions(tmp_path, {"a": [], "b": [], "c": [], "d": points})
    # a 0-10 and b 5-15 share 5 of 10 s; c 100-110 and 120-130, d (by its journal) 100-105
    assert {name: run.cells_at_a_time for name, run in conditions.items()} == {"a": 1.5, "b": 1.5, "c": 1.25, "d": 2.0}
    assert [run.num_starts for run in conditions.values()] == [1, 1, 2, 1]
    assert conditions["a"].hardware == "x, cpu, 2 cores"
    (tmp_path / "runs" / "a" / "environment.json").write_text("[1]")
    assert read_conditions(tmp_path, {"a": []})["a"].hardware == ""


def test_values_along_an_axis():
    values = read_along_axis(make_arms({"dense": DENSE, "switch": QUICK}), "seconds")
    dense, switch = values.arms
    # 50 % of 100 s: dense between 4 (40 s) and 3 (60 s), .55034; the arm between 4 (40 s) and 3 (80 s), .32193
    assert dense.at_share[2] == pytest.approx([3.44966] * 3, abs=1e-5)
    assert switch.at_share[2] == pytest.approx([3.67807] * 3, abs=1e-5)
    assert switch.at_share[0] == ()  # 10 s are before its first evaluation
    assert switch.spent == 200
    assert values.map_steps()["switch"] == {20: 40, 40: 80, 60: 120, 80: 160, 100: 200}
    table = build_axis_table(values)
    assert [column.header for column in table.columns][1:3] == ["10 %: 10", "25 %: 25"]
    assert table.rows[1][1] == "–"
    assert values.to_dict()["arms"]["switch"]["at_share_of_baseline"]["0.1"] is None


def test_the_table_has_a_sentence_for_each_arm():
    table = build_fairness_table(compare({"dense": DENSE, "switch": QUICK})[0])
    ((arm, pairs, tokens, flops, parameters, *_),) = table.rows
    assert (arm, pairs, parameters) == ("switch", "3", "not run")
    assert tokens == flops == "−0.1900 ± 0.0248"
    assert table.notes[0].startswith("switch against dense: ahead at equal tokens, FLOPs;")
