"""Evaluation curves over steps, tokens, FLOPs and seconds, from journals."""

from dataclasses import replace

import pytest
from support.comparison_runs import make_cost, make_result

from moebench.analysis.fairness.run_curve import build_run_curve
from moebench.runs.journal import Point

RUN = replace(
    make_result("switch", 0, 2.0, cost=make_cost(flops=10.0, train_tokens=1000.0)), throughput={"train_s": 60.0}
)
"""100 steps; 3 * 10 * 1000 = 30,000 FLOPs."""


def point(step, **metrics):
    return Point(step=step, time=0.0, metrics={name.replace("__", "/"): v for name, v in metrics.items()}, end=0)


def build(*points):
    return build_run_curve(points, RUN, "bits_per_byte")


def test_costs_without_samples_are_even():
    curve = build(point(50, eval__bits_per_byte=3.0), point(100, eval__bits_per_byte=2.0))
    assert curve.value_P.tolist() == [3, 2]
    assert {axis: values.tolist() for axis, values in curve.budgets.items()} == {
        "steps": [50, 100],
        "tokens": [500, 1000],
        "flops": [15_000, 30_000],
        "seconds": [30, 60],
    }


def test_samples_give_the_shape_and_totals_the_end():
    # Steps 1-50 at 100 tokens/s, 51-100 at 50: a third and two thirds of 60 s. FLOPs: 1 and 3 units, a quarter first.
    curve = build(
        point(50, train__tokens_per_s=100.0, train__load__flops_per_token=1.0),
        point(50, eval__bits_per_byte=3.0),
        point(100, train__tokens_per_s=50.0, train__load__flops_per_token=3.0),
        point(100, eval__bits_per_byte=2.0),
    )
    assert curve.budgets["seconds"] == pytest.approx([20, 60])
    assert curve.budgets["flops"] == pytest.approx([7_500, 30_000])


def test_recorded_seconds_are_used_if_they_increase():
    points = [point(50, eval__bits_per_byte=3.0, time__train_s=10.0)]
    assert build(*points, point(100, eval__bits_per_byte=2.0, time__train_s=25.0)).total("seconds") == 25
    assert build(*points, point(100, eval__bits_per_byte=2.0, time__train_s=9.0)).total("seconds") == 60
    assert build(*points, point(100, eval__bits_per_byte=2.0)).total("seconds") == 60


def test_a_curve_needs_the_last_step_and_finite_values():
    assert build(point(50, eval__bits_per_byte=3.0)) is None
    assert build(point(50, eval__bits_per_byte=3.0), point(100, eval__bits_per_byte=float("nan"))) is None
    again = [point(50, eval__bits_per_byte=9.0), point(50, eval__bits_per_byte=3.0)]
    assert build(*again, point(100, eval__bits_per_byte=2.0)).value_P.tolist() == [3, 2]


def test_values_are_read_between_evaluations_only():
    curve = build(point(50, eval__bits_per_byte=3.0), point(100, eval__bits_per_byte=2.0))
    assert curve.read_at("tokens", 500 * 2**0.5) == pytest.approx(2.5)  # in the middle of the logarithms
    assert curve.read_at("tokens", 400) is None  # before the first evaluation
    assert curve.read_at("tokens", 1015) == 2.0  # 2 % after the end count as the end
    assert curve.read_at("tokens", 990) == 2.0
    assert curve.read_at("tokens", 1030) is None


def test_unknown_costs_leave_their_axis_out():
    run = replace(RUN, cost={}, throughput={})
    curve = build_run_curve([point(100, eval__bits_per_byte=2.0)], run, "bits_per_byte")
    assert [*curve.budgets] == ["steps"]
    assert curve.read_at("flops", 1) is None
