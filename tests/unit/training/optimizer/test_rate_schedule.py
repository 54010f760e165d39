"""The schedules, by hand and as documented."""

import math
import re
from typing import Any

import pytest

from moebench.schema import TrainConfig
from moebench.training.optimizer.schedule import compute_rate_factor


def rates(updates: list[int], **options: Any) -> list[float]:
    train = TrainConfig(**({"steps": 12, "warmup_steps": 2, "final_rate": 0.1} | options))
    return [compute_rate_factor(step, train) for step in updates]


def test_cosine() -> None:
    # 2 steps of warm-up: 1/2, 1. Then a cosine over 10 steps: 0.1 + 0.9 · (1 + cos(π p)) / 2.
    assert rates([0, 1, 2]) == [0.5, 1.0, 1.0]
    half_way, last = 0.1 + 0.9 * 0.5, 0.1 + 0.45 * (1 + math.cos(math.pi * 0.9))
    assert rates([7, 11, 12, 99]) == pytest.approx([half_way, last, 0.1, 0.1])


def test_linear() -> None:
    # 10 steps from 1 to 0.1: 0.09 less in each.
    assert rates([0, 1, 2, 3, 7, 11, 12, 99], schedule="linear") == pytest.approx(
        [0.5, 1, 1, 0.91, 0.55, 0.19, 0.1, 0.1]
    )


def test_constant() -> None:
    assert rates([0, 1, 2, 11, 99], schedule="constant") == [0.5, 1, 1, 1, 1]


def test_inverse_square_root() -> None:
    # sqrt(2 / (u + 1)), which is 1 in the last update of the warm-up.
    assert rates([0, 1, 2, 7, 17], schedule="inverse_sqrt") == pytest.approx([0.5, 1, math.sqrt(2 / 3), 0.5, 1 / 3])
    assert rates([0, 3], schedule="inverse_sqrt", warmup_steps=0) == [1, 0.5]


@pytest.mark.parametrize(
    ("shape", "expected"), [("linear", [0.75, 0.5]), ("cosine", [0.8535534, 0.5]), ("sqrt", [0.5, 0.2928932])]
)
def test_wsd(shape: str, expected: list[float]) -> None:
    # The last 4 of 12 updates: q = 0, 1/4, 2/4, 3/4. (1 + cos(π/4)) / 2 = 0.8536; 1 - sqrt(1/2) = 0.2929.
    options = {"schedule": "wsd", "decay_fraction": 1 / 3, "decay_shape": shape, "final_rate": 0.0}
    assert rates([0, 1, 2, 7, 8, 9, 10], **options) == pytest.approx([0.5, 1, 1, 1, 1, *expected])
    assert rates([12, 99], **options) == pytest.approx([0, 0], abs=1e-12)
    assert rates([9], **options | {"final_rate": 0.2}) == pytest.approx([0.2 + 0.8 * expected[0]])


def test_the_decay_of_wsd_begins_after_the_warm_up() -> None:
    # All 10 updates would decay; 6 of them are warm-up.
    options = {"schedule": "wsd", "decay_fraction": 1.0, "decay_shape": "linear", "final_rate": 0.0}
    assert rates([5, 6, 8], steps=10, warmup_steps=6, **options) == pytest.approx([1, 1, 0.5])
    without = {**options, "decay_fraction": 0.0}
    assert rates([9], steps=10, warmup_steps=0, **without) == [1]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "linear", "constant", "inverse_sqrt"])
def test_without_and_with_only_warm_up(schedule: str) -> None:
    assert rates([0], steps=5, warmup_steps=0, schedule=schedule) == [1.0]
    assert rates([0, 1, 2], steps=3, warmup_steps=10, schedule=schedule) == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "linear", "constant", "inverse_sqrt"])
def test_the_documented_formula_is_the_one_of_training(schedule: str) -> None:
    formula = re.search(rf"^        {schedule} +(.*)$", TrainConfig.__doc__ or "", re.MULTILINE)
    assert formula
    train = TrainConfig(steps=50, warmup_steps=7, final_rate=0.1, schedule=schedule)
    s = max(train.warmup_steps, train.steps - round(train.decay_fraction * train.steps))
    for u in range(train.warmup_steps, train.steps + 2):
        p = min(1, (u - train.warmup_steps) / max(1, train.steps - train.warmup_steps))
        q = max(0, min(1, (u - s) / max(1, train.steps - s)))
        functions = {"cos": math.cos, "pi": math.pi, "sqrt": math.sqrt, "f": lambda q: 1 - math.sqrt(q)}
        documented = eval(formula[1], {**vars(train), **functions, "u": u, "p": p, "q": q})
        assert documented == pytest.approx(compute_rate_factor(u, train))
