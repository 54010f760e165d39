"""Baselines of masked tokens and removed spans equal a slow count over dictionaries of what a model sees."""

import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.slow_ngrams import by_name, count, make_task, predict, write_domains

from moebench.tasks.baselines.span_corruption import compute_sentinel_nats, restore_text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_domains(tmp_path_factory.mktemp("text"))


def test_masked_tokens_are_predicted_from_visible_ones(text: Path, tmp_path: Path) -> None:
    task: Any = make_task(text, tmp_path, "masked_language", rate=0.3)
    train = task.text.train.tokens_N.tolist()
    left = [count([train], order) for order in (1, 2, 3)]
    around = [count([train], 1), count([train], 2), defaultdict(Counter)]
    for before, token, after in zip(train, train[1:], train[2:], strict=False):
        around[2][before, after][token] += 1
    nats, weight = {"order-3 n-gram": 0.0, "order-3 two-sided n-gram": 0.0}, 0
    for batch in task.eval_batches("test", 4):
        for row in range(len(batch.domain_B)):
            shown, target = batch.input_BL[row].tolist(), batch.target_BP[row].tolist()
            for position in range(len(shown)):
                if not batch.count_BP[row, position]:
                    continue
                weight += int(batch.weight_BP[row, position])
                before: list[int] = []
                while len(before) < position and len(before) < 2 and shown[position - len(before) - 1] != task.mask_id:
                    before.insert(0, shown[position - len(before) - 1])
                p = {"order-3 n-gram": predict(left, before, target[position], 257)}
                tables = around[: 1 + len(before[:1])]
                value = predict(tables, before, target[position], 257)
                if before and position + 1 < len(shown) and shown[position + 1] != task.mask_id:
                    seen = around[2].get((before[-1], shown[position + 1]))
                    if seen:
                        value = (seen[target[position]] + len(seen) * value) / (seen.total() + len(seen))
                p["order-3 two-sided n-gram"] = value
                for name, probability in p.items():
                    if shown[position] != task.mask_id:
                        probability = 0.5 * (shown[position] == target[position]) + 0.5 * probability
                    nats[name] -= math.log(probability)
    baselines = by_name(task.compute_baselines("test"))
    for name, total in nats.items():
        value = baselines[name].values["masked_bits_per_byte"]
        assert value == pytest.approx(total / math.log(2) / weight, rel=1e-9)
    assert baselines["order-3 two-sided n-gram"].is_reference


def test_removed_spans_are_predicted_from_the_text_before(text: Path, tmp_path: Path) -> None:
    task: Any = make_task(text, tmp_path, "span_corruption", noise_density=0.25, mean_span=2.0)
    train = task.text.train.tokens_N.tolist()
    tables = [count([train], order) for order in (1, 2, 3)]
    num_noise, num_spans = task.config.num_noise, task.config.num_spans
    assert (num_noise, num_spans) == (6, 3)
    nats, weight = 0.0, 0
    for batch in task.eval_batches("test", 4):
        weight += int(batch.weight_BP.sum())
        for encoder, target in zip(batch.input_BL.tolist(), batch.target_BP.tolist(), strict=True):
            window: list[int] = []
            for token in encoder:
                if token < task.first_sentinel:
                    window.append(token)
                    continue
                at = target.index(token) + 1
                while target[at] < task.first_sentinel:
                    nats -= math.log(predict(tables, window, target[at], 257))
                    window.append(target[at])
                    at += 1
            # 6 tokens fall into 3 non-empty spans in C(5, 2) = 10 equally likely ways
            nats += math.log(10)
    values = by_name(task.compute_baselines("test"))["order-3 n-gram"].values
    assert values["span_bits_per_byte"] == pytest.approx(nats / math.log(2) / weight, rel=1e-9)


def test_the_text_of_a_window_is_restored(text: Path, tmp_path: Path) -> None:
    task: Any = make_task(text, tmp_path, "span_corruption")
    language = make_task(text, tmp_path, "language")
    for corrupted, plain in zip(task.eval_batches("test", 4), language.eval_batches("test", 4), strict=True):
        token_BL, is_removed_BL = restore_text(corrupted, task.first_sentinel, task.start_id)
        assert torch.equal(torch.from_numpy(token_BL), plain.target_BP)
        assert (is_removed_BL.sum(1) == task.config.num_noise).all()


def test_every_division_into_spans_costs_the_same() -> None:
    # 4 removed tokens in 2 spans: x t y t t t z, x t t y t t z, x t t t y t z; each 1/3
    patterns = np.array([list("x.x...x"), list("x..x..x"), list("x...x.x")]) == "x"
    assert compute_sentinel_nats(patterns) == pytest.approx(np.full(3, math.log(3)))
