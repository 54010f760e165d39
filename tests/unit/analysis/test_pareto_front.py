"""The Pareto front of a curve: a point is dominated only where that is shown."""

from collections.abc import Sequence

from moebench.analysis.sweep.pareto import find_front
from moebench.analysis.sweep.points import Point

NOISE = (-0.02, 0.0, 0.03, 0.01, -0.02)


def point(arm: str, mean: float, flops: float, noise: Sequence[float] = NOISE) -> Point:
    return Point(
        arm=arm,
        settings={},
        quality={seed: mean + error for seed, error in enumerate(noise)},
        flops=dict.fromkeys(range(len(noise)), flops),
        load={},
        relative_flops=1.0,
    )


JITTER = (0.001, -0.001, 0.002, 0.0, -0.002)
OTHER = tuple(a + b for a, b in zip(NOISE, JITTER, strict=True))
UNRELATED = (0.4, -0.5, 0.3, 0.2, -0.4)


def test_better_at_no_more_cost_dominates() -> None:
    points = [point("a", 2.0, 100), point("b", 2.1, 100, OTHER), point("c", 2.1, 200, OTHER)]
    front = find_front(points, lower_is_better=True)
    assert set(front.dominated) == {1, 2}
    domination = front.dominated[1]
    assert domination.by.arm == "a"
    assert 0 < domination.interval[0] < domination.difference < domination.interval[1]


def test_the_sign_follows_the_metric() -> None:
    points = [point("a", 2.0, 100), point("b", 2.1, 100, OTHER)]
    assert set(find_front(points, lower_is_better=False).dominated) == {0}


def test_better_at_more_cost_does_not_dominate() -> None:
    points = [point("cheap", 2.1, 100), point("good", 2.0, 103, OTHER)]
    assert find_front(points, lower_is_better=True).dominated == {}
    within = [point("cheap", 2.1, 100), point("good", 2.0, 102, OTHER)]  # 2 % count as equal
    assert set(find_front(within, lower_is_better=True).dominated) == {0}


def test_a_difference_that_is_not_shown_does_not_dominate() -> None:
    points = [point("a", 2.0, 100), point("b", 2.1, 100, UNRELATED)]
    front = find_front(points, lower_is_better=True)
    assert (front.dominated, front.num_tests) == ({}, 1)


def test_two_seeds_judge_nothing() -> None:
    points = [point("a", 2.0, 100, (0.0, 0.01)), point("b", 3.0, 100, (0.0, 0.02))]
    front = find_front(points, lower_is_better=True)
    assert (front.dominated, front.num_tests) == ({}, 0)
    assert "three common seeds" in front.describe()
