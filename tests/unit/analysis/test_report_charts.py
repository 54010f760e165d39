"""The parts of a report, by hand."""

from dataclasses import replace

import numpy as np
import pytest
from support.comparison_runs import list_cells, make_results, with_own_jitter

from moebench.analysis.compare.comparison import compare
from moebench.analysis.compare.shown_arms import select_names
from moebench.analysis.html_report.differences import build_forest
from moebench.analysis.html_report.domains import build_domain_tables
from moebench.analysis.html_report.load_steps import build_step_maps
from moebench.analysis.html_report.loads import average_loads, build_heat_maps
from moebench.analysis.html_report.pareto import build_pareto, place_labels
from moebench.analysis.html_report.report_runs import ReportRun
from moebench.analysis.html_report.settings import flatten_settings
from moebench.analysis.html_report.verdicts import describe_arms, describe_outcome
from moebench.runs.layer_series import LayerPoint, LayerValues

RESULTS = with_own_jitter(make_results({"dense": 0.0, "switch": -0.1, "hash": 0.2}))
COMPARISON = compare(RESULTS, expected=list_cells(RESULTS), baseline="dense")
DIFFERENCES = COMPARISON.differences


def test_the_best_and_the_worst_of_many_arms_are_shown() -> None:
    values = {f"arm{index}": float(index) for index in range(20)}
    names = {f"arm{index}" for index in (0, 1, 2, 3, 4, 5, 9, 15, 16, 17, 18, 19)}
    assert select_names(values, "arm9", lower_is_better=True) == names
    assert len(select_names(values, None, lower_is_better=False)) == 12
    assert select_names({"a": 1.0}, "b", lower_is_better=True) == {"a"}


def test_arms_with_a_verdict_come_first() -> None:
    better, worse = describe_arms(COMPARISON)
    assert better.text == COMPARISON.describe_difference("switch")
    assert (better.tone, worse.tone) == ("good", "bad")
    undecided = tuple(
        replace(pair, verdict="undecided" if pair.arm == "switch" else pair.verdict) for pair in DIFFERENCES
    )
    comparison = replace(COMPARISON, differences=undecided)
    assert [(each.arm, each.tone) for each in describe_arms(comparison)] == [("hash", "bad"), ("switch", "open")]


def test_the_answer_names_the_best_arm_or_counts_verdicts() -> None:
    assert describe_outcome(COMPARISON) == "switch is the best of 3 arms."
    plain = replace(COMPARISON, arms=tuple(replace(arm, marks=()) for arm in COMPARISON.arms))
    assert describe_outcome(plain) == "Compared with dense: 1 better, 1 worse."
    undecided = tuple(replace(pair, verdict="undecided") for pair in DIFFERENCES)
    assert describe_outcome(replace(plain, differences=undecided)) == (
        "None of the 2 other arms is shown to differ from dense."
    )
    mixed = (replace(DIFFERENCES[0], verdict="equivalent"), undecided[1])
    assert describe_outcome(replace(plain, differences=mixed)) == (
        "Compared with dense: 1 equivalent, 1 without a verdict."
    )


def test_the_forest_is_ordered_and_on_one_axis() -> None:
    forest = build_forest(COMPARISON)
    assert forest is not None
    assert [row.arm for row in forest.rows] == ["switch", "hash"]
    first, second = forest.rows
    assert first.mean is not None
    assert second.mean is not None
    # -0.1 and 0.2: zero is at a third of the way between them.
    assert (forest.zero - first.mean) / (second.mean - first.mean) == pytest.approx(1 / 3)
    assert len(first.seeds) == 5


def test_experts_are_sorted_before_seeds_are_averaged() -> None:
    loads = [{"0": [1.0, 3.0], "1": [2.0, 2.0]}, {"0": [6.0, 2.0], "1": [0.0, 0.0]}]
    profile = average_loads(loads)
    assert list(profile) == ["0"]  # a seed has no token in layer 1
    np.testing.assert_allclose(profile["0"], [1.5, 0.5])


def test_a_map_of_steps_has_a_column_for_each_step_and_a_row_for_each_expert() -> None:
    counts = {"tokens": 8, "dropped": 0, "rerouted": 0, "unserved": 0, "experts_per_token": 1.0, "flops_per_token": 1.0}
    loads = [(2, 2), (2, 2), (4, 0)]
    series = [LayerPoint(step=step, layers={"1": LayerValues(load=load, **counts)}) for step, load in enumerate(loads)]
    runs = [ReportRun(arm="switch", seed=seed, series=series) for seed in (3, 4)]
    (maps,) = build_step_maps(COMPARISON, runs)
    (layer,) = maps.layers
    assert maps.caption == "seed 3, 2 experts, steps 0 to 2"
    assert (layer.num_columns, layer.num_rows) == (3, 2)
    assert layer.caption == "layer 1: busiest 2.0 × even, 1 dead"
    assert layer.shapes[4] == "M0 0h2v1h-2zM0 1h2v1h-2z"  # even in two steps
    assert layer.shapes[6] == "M2 0h1v1h-1z"  # twice an even load
    assert layer.shapes[0] == "M2 1h1v1h-1z"  # dead


def test_a_heat_map_draws_equal_neighbours_as_one() -> None:
    runs = [ReportRun(arm="switch", seed=0, loads={"0": [10.0, 10.0, 10.0, 0.0, 0.0, 0.0, 0.0, 0.0]})]
    (heat,) = build_heat_maps(COMPARISON, runs)
    assert heat.shapes[0] == "M3 0h5v1h-5z"  # dead
    assert heat.shapes[6] == "M0 0h3v1h-3z"  # 2.67 times an even load
    assert heat.caption == "8 experts, 1 layer; busiest 2.7 × even; 1 seed"


def test_arms_that_no_other_beats_at_lower_cost_are_efficient() -> None:
    costs = {"dense": 1.0, "switch": 2.0, "hash": 3.0}
    arms = tuple(
        replace(arm, cost={"total_params": 1e6 * costs[arm.arm]}, tokens_per_s=None) for arm in COMPARISON.arms
    )
    (chart,) = build_pareto(replace(COMPARISON, arms=arms))
    assert chart.label == "total parameters"
    assert {mark.arm for mark in chart.marks if mark.is_efficient} == {"dense", "switch"}


def test_names_in_a_chart_do_not_cover_each_other() -> None:
    arms = tuple(replace(arm, cost={"total_params": 1e6}, tokens_per_s=None) for arm in COMPARISON.arms)
    (chart,) = build_pareto(replace(COMPARISON, arms=arms))
    marks = [replace(chart.marks[0], arm=f"arm{index}", x=100.0, y=100.0, label="") for index in range(30)]
    labels = [(mark.anchor, mark.label_x, mark.label_y) for mark in place_labels(marks) if mark.label]
    assert len(labels) == len(set(labels)) < 30


def test_differences_by_domain_are_paired_and_shaded() -> None:
    results = make_results({"dense": 0.0, "switch": -0.1, "hash": 0.2})
    runs = [ReportRun(arm=result.arm, seed=result.seed, result=result) for result in results]
    tables = build_domain_tables(compare(results, expected=list_cells(results), baseline="dense"), runs)
    assert tables is not None
    assert [column.header for column in tables.means.columns] == ["arm", "code", "law"]
    arm, code, law = tables.differences.rows[0]
    assert (arm, code, law) == ("switch", "−0.1000", "−0.1000")
    assert code.interval == pytest.approx((-0.10196, -0.09804), abs=1e-5)
    assert tables.shades == (("", "good-2", "good-2"), ("", "bad-4", "bad-4"))


def test_settings_are_flat_and_without_the_seed() -> None:
    nested = {"seed": 1, "train": {"steps": 5, "clip": None}, "router": {"losses": {"z": 0.1}, "name": "x"}}
    assert flatten_settings(nested) == {
        "train.steps": "5", "train.clip": "null", "router.losses.z": "0.1", "router.name": "x"
    }  # fmt: skip
