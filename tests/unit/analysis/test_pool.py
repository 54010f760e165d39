"""Experiments pooled: effects, tests, arms that are missing, diverged or not matched."""

import json
from dataclasses import replace

import pytest
from support.comparison_runs import fail_seeds, list_cells, make_cost, make_result, make_results

from moebench.analysis.compare.comparison import compare
from moebench.analysis.compare.values import BITS_PER_BYTE, ComparisonMetric
from moebench.analysis.pooled.pool import pool_comparisons
from moebench.analysis.pooled.report import build_pooled_report
from moebench.errors import UsageError
from moebench.tasks.baselines.baseline import TrivialBaseline

SD = 0.0015811
"""Of the differences that `make_results` makes."""


def compare_offsets(offsets, num_seeds=5, **keys):
    results = keys.pop("results", None) or make_results(offsets, num_seeds)
    return compare(results, expected=list_cells(results), baseline=keys.pop("baseline", "dense"), **keys)


def pool(**comparisons):
    pooled = pool_comparisons(comparisons)
    return pooled, {arm.arm: arm for arm in pooled.arms}


def test_effects_and_p_by_hand():
    # Two experiments, differences -0.01 and -0.02 with the same jitter, 5 seeds each: 10 pairs of one sign, 2 of 1024.
    pooled, arms = pool(
        a=compare_offsets({"dense": 0, "switch": -0.01}), b=compare_offsets({"dense": 0, "switch": -0.02})
    )
    switch = arms["switch"]
    assert pooled.scales == pytest.approx({"a": SD, "b": SD}, rel=1e-3)
    assert switch.tasks["a"].effect == pytest.approx(0.01 / SD, rel=1e-3)  # better is positive
    assert switch.fixed.effect == pytest.approx(0.015 / SD, rel=1e-3)
    assert switch.fixed.p == 2 / 1024
    assert switch.fixed.p_holm == switch.fixed.p
    assert switch.fixed.interval[0] < switch.fixed.effect < switch.fixed.interval[1]
    assert switch.verdict == "better"
    assert switch.across is None  # two experiments
    json.dumps(pooled.to_dict(), allow_nan=False)


def test_across_tasks_the_experiment_is_the_unit():
    offsets = (-0.01, -0.02, -0.03)
    experiments = {name: compare_offsets({"dense": 0, "switch": d}) for name, d in zip("abc", offsets, strict=True)}
    across = pool(**experiments)[1]["switch"].across
    # effects 1, 2, 3 times .01 / SD: t = 2 * sqrt 3 = 3.4641 with 2 degrees of freedom, p = .07418
    assert across.effect == pytest.approx(0.02 / SD, rel=1e-3)
    assert across.p == pytest.approx(0.07418, abs=1e-5)


def test_better_is_positive_whatever_the_direction_of_the_metric():
    higher = ComparisonMetric(name="bits_per_byte", lower_is_better=False)
    experiments = {"a": compare_offsets({"dense": 0, "switch": 0.01}, metric=higher)}
    assert pool(**experiments)[1]["switch"].tasks["a"].effect > 0


def test_experiments_below_trivial_baselines_are_marked():
    trivial = TrivialBaseline(name="order-3 n-gram", meaning="counts", values={"bits_per_byte": 1.9}, is_reference=True)
    below = replace(compare_offsets({"dense": 0, "switch": -0.01}), trivial_baselines=(trivial,))  # dense: 2.0
    above = replace(below, trivial_baselines=(replace(trivial, values={"bits_per_byte": 2.5}),))
    report = build_pooled_report(pool(a=below, b=above, c=replace(below, trivial_baselines=()))[0])
    marks = [note for note in report.notes if "below trivial" in note]
    assert marks == ["a: below trivial baselines: a ranking at this size says little"]
    marked = {name: values["below_trivial_baselines"] for name, values in report.values["experiments"].items()}
    assert marked == {"a": True, "b": False, "c": None}


def test_an_arm_counts_where_it_is():
    a = compare_offsets({"dense": 0, "switch": -0.01, "hash": 0.01})
    b = compare_offsets({"dense": 0, "hash": 0.02})
    pooled, arms = pool(a=a, b=b)
    assert [*arms["switch"].tasks] == ["a"]
    assert (arms["switch"].num_pairs, arms["hash"].num_pairs) == (5, 10)
    assert (arms["switch"].verdict, arms["hash"].verdict) == ("too few pairs", "worse")
    report = build_pooled_report(pooled)
    assert "Note: switch is not in b." in report.notes
    assert "Note: switch: with 5 pairs and 2 arms the smallest possible p Holm is 0.12." in report.notes
    by_task = {row[0]: row[1:] for row in report.tables[1].rows}
    assert by_task["switch"][1] == "–"
    assert by_task["switch"][0] == "−0.0100 (+6.3) better"
    assert report.values["arms"]["hash"]["sentence"].startswith(
        "Over 2 experiments (10 pairs), hash is worse than dense: −9.49 ["
    )


def test_unmatched_and_diverged_experiments_give_no_verdict():
    good = compare_offsets({"dense": 0, "switch": -0.01})
    costly = [
        replace(run, cost=make_cost(3e6)) if run.arm == "switch" else run
        for run in make_results({"dense": 0, "switch": -0.01})
    ]
    pooled, arms = pool(a=good, b=compare_offsets({}, results=costly))
    assert arms["switch"].tasks["b"].reason == "not matched"
    assert (arms["switch"].num_pairs, len(arms["switch"].counted)) == (5, 1)
    failed = fail_seeds(make_results({"dense": 0, "switch": -0.01}), "switch", (1,), "diverged")
    pooled, arms = pool(a=good, b=compare_offsets({}, results=failed))
    assert arms["switch"].verdict == "diverged"
    report = build_pooled_report(pooled)
    assert report.notes[0] == "switch minus dense: no pooled verdict (diverged in b)."
    assert report.problems[0].startswith("FAILED b: switch, seed 1")


def test_experiments_need_one_baseline():
    other = compare_offsets({"dense": 0, "switch": -0.01}, baseline="switch")
    with pytest.raises(UsageError, match=r"different baselines \(dense in a, switch in b\)"):
        pool(a=compare_offsets({"dense": 0, "switch": -0.01}), b=other)


def test_experiments_with_too_few_seeds_do_not_count():
    pooled, arms = pool(a=compare_offsets({"dense": 0, "switch": -0.01}, 2))
    assert (arms["switch"].tasks["a"].reason, arms["switch"].fixed) == ("too few seeds", None)
    assert pooled.scales == {"a": None}
    same = [make_result(arm, seed, 2.0 + seed) for seed in range(3) for arm in ("dense", "switch")]
    pooled, arms = pool(a=compare(same, expected=list_cells(same), baseline="dense", metric=BITS_PER_BYTE))
    assert arms["switch"].tasks["a"].reason == "no spread between seeds"


def test_the_strictest_level_of_the_experiments_counts():
    a, b = (compare_offsets({"dense": 0, "switch": offset}) for offset in (-0.01, -0.02))
    early = replace(b, differences=tuple(replace(pair, level=0.001) for pair in b.differences))
    pooled, arms = pool(a=a, b=early)
    # p is 2 / 1024 = .00195
    assert (arms["switch"].level, arms["switch"].verdict) == (0.001, "undecided")
    assert any("verdict at level 0.001" in note for note in build_pooled_report(pooled).notes)
